"""The losses: functions of logits, and beside each its module, which holds the options.

Common to all of them:

- Logits are ``[..., C]`` in float32, bfloat16 or float16 (float64 through the eager backend), student and
  teacher of equal shape on one device; leading dimensions are rows, and slices such as ``logits[:, :-1]`` of
  ``[B, T, C]`` are read in place. Arithmetic is in float32, the gradient has the student's dtype. The teacher
  is a constant and must not require grad.
- Several pairs of logits of equal shape, such as the heads of a multi-head student, go through one call as
  two lists: one launch on a GPU, and a result with a first dimension for the pairs (``[H]``, or ``[H, ...]``
  for "none"). ``target`` and ``weight`` apply to every pair. Heads with other classes need separate calls.
- ``LinearLogits(hidden, weight, bias)`` stands for the logits of a last layer wherever a loss takes a tensor:
  they are computed in chunks of rows and never stored, and the gradients are those of ``hidden``, ``weight``
  and ``bias``, accumulated in float32. They are computed with the loss, in float16 too, and ``"none"`` has
  no gradient: give ``weight``. The eager backend stores the logits. ``LinearDistillLoss`` is a module that
  owns the head, for DDP, FSDP and checkpoints.
- ``TopKLogits(log_probs, indices, …)``, which ``top_k`` makes, stands for a teacher known at K classes. All
  others are one class: the loss is that over K + 1 classes. It is at one temperature, and undefined for the
  Bernoulli losses, for standardised logits, and for whatever reads the teacher at two temperatures.
- ``ShardedLogits(local, group, …)`` stands for a rank's classes of logits that are spread over a process
  group. The loss, in plain torch, has the same bits on every rank, and backward exchanges nothing.
- T^2 is included, so that a weight means the same at every temperature; not in the
  divergences of ``losses/divergences.py``, as is the custom for language models, and ``ttm_loss`` has no T.
- ``reduction``: ``"batchmean"`` (sum over the non-ignored rows, divided by their number), ``"sum"``, or
  ``"none"`` (one value per row, in the shape of the leading dimensions). ``"mean"`` is refused.
- ``weight`` [...], if given, multiplies each row's loss; "batchmean" still divides by the number of rows.
- If there is a ``target``, a row whose label is ``ignore_index`` adds nothing to loss, gradient or count; if
  no row is left, the loss is 0.
- Rows of weight 0 and ignored rows are not read: they may hold anything. In any other row a NaN logit gives
  a NaN loss and gradient, and affects no other row.
- The gradient is computed with the loss; in float16 in backward, from the logits, so that a loss scale
  reaches it before it is rounded. It differentiates once; ``create_graph=True`` raises (use
  ``fastkd.set_backend("eager")`` for second derivatives). Inside the transforms of ``torch.func`` and in
  forward-mode AD the backend "auto" computes in plain torch, and a fused one asked for by name refuses.
- Weights, temperatures and other numbers may change at every call, under ``torch.compile`` too: from its
  second value on none is compiled in, except that 0 and 1, which may select other code, compile once more.
  Temperatures are from 1e-6 to 1e6.
- TypeError and ValueError name the argument, its value and what is expected, before anything is computed.
"""

from .binary_kl import BinaryKLLoss, BinaryKLNormLoss, binary_kl_loss, binary_kl_norm_loss
from .divergences import (
    JSDLoss,
    ReverseKLLoss,
    SkewKLLoss,
    TVDLoss,
    jsd_loss,
    reverse_kl_loss,
    skew_kl_loss,
    tvd_loss,
)
from .forms import LinearLogits, ShardedLogits, TopKLogits
from .head import LinearDistillLoss
from .known import check_top_k, top_k
from .nkd import NKDLoss, nkd_loss
from .softmax import DCKDLoss, DistillLoss, DKDLoss, KDLoss, dckd_loss, distill_loss, dkd_loss, kd_loss
from .ttm import TTMLoss, ttm_loss

__all__ = [
    "BinaryKLLoss",
    "BinaryKLNormLoss",
    "DCKDLoss",
    "DKDLoss",
    "DistillLoss",
    "JSDLoss",
    "KDLoss",
    "LinearDistillLoss",
    "LinearLogits",
    "NKDLoss",
    "ReverseKLLoss",
    "ShardedLogits",
    "SkewKLLoss",
    "TTMLoss",
    "TVDLoss",
    "TopKLogits",
    "binary_kl_loss",
    "binary_kl_norm_loss",
    "check_top_k",
    "dckd_loss",
    "distill_loss",
    "dkd_loss",
    "jsd_loss",
    "kd_loss",
    "nkd_loss",
    "reverse_kl_loss",
    "skew_kl_loss",
    "top_k",
    "ttm_loss",
    "tvd_loss",
]

"""The losses as functions of logits: what most users import.

Common to all of them:

- Logits are ``[..., C]`` in float32, bfloat16 or float16 (float64 through the eager backend), student and
  teacher of equal shape on one device; leading dimensions are rows, and slices such as ``logits[:, :-1]`` of
  ``[B, T, C]`` are read where they lie. Arithmetic is in float32, the gradient comes back in the student's
  dtype. The teacher is a constant and must not require grad.
- Several pairs of logits of equal shape, such as the heads of a multi-head student, go through one call as
  two lists: one launch on a GPU, and a result with a first dimension for the pairs (``[H]``, or ``[H, ...]``
  for "none"). ``target`` and ``weight`` hold for every pair. Heads of different classes need a call each.
- T^2 is included, so that a weight means the same at every temperature; not in ``reverse_kl_loss`` and
  ``jsd_loss``, as is the custom for language models, and ``ttm_loss`` has no T.
- ``reduction``: ``"batchmean"`` (sum over the rows that count, divided by their number), ``"sum"``, or
  ``"none"`` (one value a row, in the shape of the leading dimensions). ``"mean"`` is refused.
- ``weight`` [...], where given, multiplies each row's loss; "batchmean" still divides by the number of rows.
- Where there is a ``target``, a row whose label is ``ignore_index`` adds nothing to loss, gradient or count;
  with no row left the loss is 0.
- Rows of weight 0 and rows left out are not read: they may hold anything. In any other row a NaN logit gives
  a NaN loss and gradient, and touches no other row.
- The gradient is computed with the loss; in float16 in backward, from the logits, so that a loss scale
  reaches it before it is rounded. It differentiates once; ``create_graph=True`` raises (use
  ``fastkd.set_backend("eager")`` for second derivatives). Inside the transforms of ``torch.func`` and in
  forward-mode AD the backend "auto" computes in plain torch, and a fused one asked for by name refuses.
- Weights, temperatures and other numbers may change at every call, under ``torch.compile`` too: none is
  compiled in. Temperatures are from 1e-6 to 1e6.
- TypeError and ValueError name the argument, its value and what is expected, before anything is computed.
"""

from torch import Tensor

from fastkd import checks
from fastkd.rows import Logits, reduced_loss

__all__ = [
    "binary_kl_loss",
    "binary_kl_norm_loss",
    "dckd_loss",
    "distill_loss",
    "dkd_loss",
    "jsd_loss",
    "kd_loss",
    "nkd_loss",
    "reverse_kl_loss",
    "ttm_loss",
]


def kd_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float = 4.0,
    standardize: bool = False,
    target: Tensor | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)): knowledge distillation (Hinton et al. 2015).

    With ``standardize`` the logits of each row are first brought to (z - mean) / (std + 1e-7) (logit
    standardisation, Sun et al. 2024; published with T 2). ``target`` [...] int64 only marks the rows to
    leave out (``ignore_index``); the loss itself uses no labels.
    """
    checks.check_options(temperature=temperature, standardize=standardize)
    loss, _ = reduced_loss(
        "softmax",
        (temperature, 0.0, 1.0, 0.0, 0.0, 0.0, standardize),
        student_logits,
        teacher_logits,
        target,
        uses_label=False,
        ignore_index=ignore_index,
        weight=weight,
        reduction=reduction,
    )
    return loss


def dkd_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    standardize: bool = False,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD): decoupled knowledge distillation (Zhao et al. 2022).

    TCKD is the KL between the two models' (p_y, 1 - p_y); NCKD the KL between their distributions over the
    classes that are not the label, which is 0 by definition where there are only two classes. ``target``
    [...] int64. Published, with a cross-entropy of weight 1 beside it: alpha 1, beta 8 (2 to 8 by pair), T 4
    and a linear warm-up over 20 epochs for CIFAR-100; beta 0.5 or 2, T 1 and 1 epoch of it for ImageNet.
    """
    return dckd_loss(
        student_logits,
        teacher_logits,
        target,
        alpha=alpha,
        beta=beta,
        temperature=temperature,
        fix_acquired=False,
        standardize=standardize,
        ignore_index=ignore_index,
        weight=weight,
        reduction=reduction,
    )


def distill_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    target: Tensor,
    *,
    ce_weight: float,
    kd_weight: float = 0.0,
    tckd_weight: float = 0.0,
    nckd_weight: float = 0.0,
    temperature: float = 4.0,
    label_smoothing: float = 0.0,
    standardize: bool = False,
    fix_acquired: bool = False,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """w_ce CE + T^2 (w_kd KD + w_t TCKD + w_n NCKD), in one pass over the same logits.

    CE is the cross-entropy of the raw student logits at T = 1, with torch's ``label_smoothing``; the
    distillation terms are those of ``kd_loss`` and ``dkd_loss``, or ``dckd_loss`` with ``fix_acquired``.
    Published: KD with w_ce 0.1 and w_kd 0.9 at T 4 (CIFAR-100), 0.5 and 0.5 at T 1 (ImageNet).

    Returns ``(loss, terms)``; ``terms`` holds, detached and for logging, the unweighted value of each term of
    non-zero weight ("ce", "kd", "tckd", "nckd"; T^2 included) under the same reduction as the loss.
    """
    weights = {"ce": ce_weight, "kd": kd_weight, "tckd": tckd_weight, "nckd": nckd_weight}
    checks.check_options(
        **{f"{name}_weight": value for name, value in weights.items()},
        temperature=temperature,
        label_smoothing=label_smoothing,
        standardize=standardize,
        fix_acquired=fix_acquired,
    )
    loss, terms = reduced_loss(
        "softmax",
        (temperature, *weights.values(), label_smoothing, standardize, fix_acquired),
        student_logits,
        teacher_logits,
        target,
        uses_label=True,
        ignore_index=ignore_index,
        weight=weight,
        reduction=reduction,
        with_terms=True,
    )
    named = zip(weights.items(), terms, strict=True)
    return loss, {name: term for (name, value), term in named if value}


def binary_kl_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float = 2.0,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """T^2 sum_i KL(Bern(sigmoid(z_t,i / T)) || Bern(sigmoid(z_s,i / T))) (Yang et al. 2024, DHKD).

    Every class is a yes-or-no question of its own: no softmax ties the classes together. Summed over the
    classes; ``"batchmean"`` divides by the rows alone. Published with T 2.
    """
    checks.check_temperature(temperature)
    return _unlabelled("binary_kl", (temperature,), student_logits, teacher_logits, weight, reduction)


def binary_kl_norm_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float = 2.0,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """T^2 sum_i KL(Bern(1/2) || Bern(sigmoid((z_s,i - z_t,i) / T))) (Yang et al. 2024, DHKD).

    Equal to T^2 sum_i log cosh((z_s,i - z_t,i) / 2T), with the gradient (T / 2) tanh of the same, so it stays
    finite at any logits, where the released formula overflows from (z_s - z_t) / T of about 17. "Norm" is the
    difference to the teacher, not a z-score. Summed over the classes. Published with T 2.
    """
    checks.check_temperature(temperature)
    return _unlabelled("binary_kl_norm", (temperature,), student_logits, teacher_logits, weight, reduction)


def dckd_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    fix_acquired: bool = True,
    standardize: bool = False,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """T^2 (alpha g TCKD + beta NCKD), g = 1 where the teacher is the surer of the label, else 0.

    A reading of DCKD (doi 10.1371/journal.pone.0314267), whose abstract alone was at hand: what the student
    has acquired is fixed, so the target term never pulls its certainty of the label back towards the
    teacher's.
    ``fix_acquired=False`` is ``dkd_loss``.
    """
    checks.check_options(
        alpha=alpha, beta=beta, temperature=temperature, fix_acquired=fix_acquired, standardize=standardize
    )
    loss, _ = reduced_loss(
        "softmax",
        (temperature, 0.0, 0.0, alpha, beta, 0.0, standardize, fix_acquired),
        student_logits,
        teacher_logits,
        target,
        uses_label=True,
        ignore_index=ignore_index,
        weight=weight,
        reduction=reduction,
    )
    return loss


def nkd_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    target: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """-p_y log q_y - gamma T^2 sum over i != y of p-hat_i log q-hat_i: normalised KD (Yang et al. 2023).

    The target term is at T = 1, the non-target distributions at T. Cross-entropy stands beside it.
    Published: gamma 1.5 and T 1 for ImageNet.
    """
    checks.check_options(gamma=gamma, temperature=temperature)
    loss, _ = reduced_loss(
        "nkd",
        (temperature, gamma),
        student_logits,
        teacher_logits,
        target,
        uses_label=True,
        ignore_index=ignore_index,
        weight=weight,
        reduction=reduction,
    )
    return loss


def ttm_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    gamma: float,
    weighted: bool = False,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """KL(softmax(gamma z_t) || softmax(z_s)): transformed teacher matching (Zheng and Yang 2024).

    The student is matched at T = 1. ``weighted`` (WTTM) multiplies each row by sum_i softmax(z_t)_i^gamma,
    which is large where the teacher is unsure. ``gamma`` is above 0, the inverse of the teacher's
    temperature.
    """
    checks.check_temperature(gamma, "gamma")
    checks.check_flag("weighted", weighted)
    return _unlabelled("ttm", (gamma, weighted), student_logits, teacher_logits, weight, reduction)


def reverse_kl_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """KL(softmax(z_s / T) || softmax(z_t / T)): the mode-seeking direction, for language models. No T^2."""
    checks.check_temperature(temperature)
    return _unlabelled("reverse_kl", (temperature,), student_logits, teacher_logits, weight, reduction)


def jsd_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q: generalised JSD, as in GKD. No T^2.

    ``beta`` is from 0 to 1; by convention 0 is KL(p || q) and 1 is KL(q || p).
    """
    checks.check_beta_of_jsd(beta)
    checks.check_temperature(temperature)
    if beta == 0.0:
        forward = (temperature, 0.0, 1.0 / temperature**2, 0.0, 0.0, 0.0, False)
        return _unlabelled("softmax", forward, student_logits, teacher_logits, weight, reduction)
    if beta == 1.0:
        return _unlabelled("reverse_kl", (temperature,), student_logits, teacher_logits, weight, reduction)
    return _unlabelled("jsd", (temperature, beta), student_logits, teacher_logits, weight, reduction)


def _unlabelled(
    loss: str,
    options: tuple[float, ...],
    student_logits: Logits,
    teacher_logits: Logits,
    weight: Tensor | None,
    reduction: str,
) -> Tensor:
    value, _ = reduced_loss(
        loss,
        options,
        student_logits,
        teacher_logits,
        None,
        uses_label=False,
        weight=weight,
        reduction=reduction,
    )
    return value

"""Lines about logits, their memory, kinds of tensor and transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.masked import masked_tensor
from torchvision import tv_tensors

import fastkd
from fastkd import BackendUnavailable
from tests.bad_inputs import FUSED, Gives, Line, Refused

from .common import S, T, W, Y, _generator, auto, dkd, group, one_row, pairs_step, same_as, step
from .unusual import TRANSFORMS, Subclass, WithoutStorage, as_dtensor, faked, jagged, nothing_real

LINES: list[Line] = []


def functional_call() -> torch.Tensor:
    head = torch.nn.Linear(6, 6, bias=False)
    return fastkd.kd_loss(torch.func.functional_call(head, {"weight": S.T @ S}, (S,)), T)


def second_derivative() -> None:
    leaf = S.clone().requires_grad_()
    torch.autograd.grad(fastkd.kd_loss(leaf, T), leaf, create_graph=True)


add = group("Logits: type, dtype, shape, device", LINES)
for words, wrong in (
    ("a list of numbers", S.tolist()), ("a NumPy array", S.numpy()), ("None", None), ("a string", "logits"),
):  # fmt: skip
    add(f"student: {words}", lambda x=wrong: fastkd.kd_loss(x, T), Refused(TypeError, "^student_logits"))
    add(f"teacher: {words}", lambda x=wrong: fastkd.kd_loss(S, x), Refused(TypeError, "^teacher_logits"))
for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
    name = str(dtype).removeprefix("torch.")
    add(
        f"student of dtype {name}",
        lambda d=dtype: fastkd.kd_loss(S.to(d), T),
        Refused(TypeError, "^student_logits has dtype"),
    )
add(
    "no dimension", lambda: fastkd.kd_loss(S[0, 0], T), Refused(ValueError, r"^student_logits has shape \[\]")
)
add("one row, [C]", lambda: step(student=S[0], teacher=T[0]), same_as(lambda: one_row()))
add("one class", lambda: fastkd.kd_loss(S[:, :1], T[:, :1]), Refused(ValueError, "at least 2 classes"))
add("no class", lambda: fastkd.kd_loss(S[:, :0], T[:, :0]), Refused(ValueError, "at least 2 classes"))
add(
    "other classes",
    lambda: fastkd.kd_loss(S, T[:, :5]),
    Refused(ValueError, "6 classes and teacher_logits 5"),
)
add(
    "other rows",
    lambda: fastkd.kd_loss(S, T[:3]),
    Refused(ValueError, r"\[4, 6\] and teacher_logits \[3, 6\]"),
)
add(
    "no rows",
    lambda: step(student=S[:0], teacher=T[:0]),
    Gives("loss 0, an empty gradient", holds=lambda r: r[0] == 0 and r[1].shape == (0, 6)),
)
add(
    "no rows, reduction none",
    lambda: step(student=S[:0], teacher=T[:0], reduction="none"),
    Gives("[0] and an empty gradient", holds=lambda r: r[0].shape == (0,) and r[1].shape == (0, 6)),
)
add(
    "no rows in lists of pairs",
    lambda: pairs_step([S[:0], S[:0]], [T[:0], T[:0]]),
    Gives("[0, 0], empty gradients", holds=lambda r: r[0].tolist() == [0, 0] and r[1].shape == (0, 6)),
)
add(
    "float16 student, float32 teacher",
    lambda: step(student=S.half()),
    same_as(lambda: step(student=S.half())),
)
add(
    "float64 student and teacher, no backend named",
    lambda: auto(lambda: step(student=S.double(), teacher=T.double())),
    same_as(lambda: step(student=S.double(), teacher=T.double())),
    ("eager",),
)
add(
    "float64 with a fused backend named",
    lambda: fastkd.kd_loss(S.double(), T.double()),
    Refused(BackendUnavailable, "float64"),
    FUSED,
)
add(
    "teacher that requires grad",
    lambda: fastkd.kd_loss(S, T.clone().requires_grad_()),
    Refused(ValueError, "^teacher_logits requires grad"),
)
add(
    "teacher on another device",
    lambda: fastkd.kd_loss(S, T.to("meta")),
    Refused(ValueError, "teacher_logits on meta"),
)
add("a list beside a tensor", lambda: fastkd.kd_loss([S], T), Refused(TypeError, "^student_logits is a list"))
add(
    "lists of different lengths", lambda: fastkd.kd_loss([S], [T, T]), Refused(ValueError, "teacher_logits 2")
)
add("empty lists", lambda: fastkd.kd_loss([], []), Refused(TypeError, r"^student_logits is \[\]"))
add(
    "pairs of different shapes",
    lambda: fastkd.kd_loss([S, S[:2]], [T, T[:2]]),
    Refused(ValueError, r"^student_logits\[1\]"),
)


add = group("Memory: strides and lazy views", LINES)
BIG = torch.randn(2, 5, 6, generator=_generator)
for words, view, of in (
    ("[:, :-1] of [B, T, C]", lambda x: x[:, :-1], BIG),
    ("every other class", lambda x: x[..., ::2], BIG),
    ("transposed", lambda x: x.mT, BIG),
    ("one row expanded to all", lambda x: x[:1].expand(4, 6), S),
    ("one class expanded to all", lambda x: x[:, :1].expand(4, 6), S),
    ("not aligned to 16 bytes", lambda x: x.flatten()[1:13].view(2, 6), S),
    ("overlapping rows", lambda x: x.flatten().as_strided((4, 6), (1, 2)), S),
    ("a lazy negation", torch._neg_view, S),
    ("the imaginary part of a conjugate", lambda x: torch.complex(x, x).conj().imag, S),
):
    teacher = view(BIG if of is BIG else T).detach()
    add(
        f"student: {words}",
        lambda v=view, o=of, t=teacher: step(student=o, teacher=t, view=v),
        same_as(
            lambda v=view, o=of, t=teacher: step(student=o, teacher=t.clone(), view=lambda x: v(x).clone())
        ),
    )
    add(
        f"teacher: {words}",
        lambda t=teacher: step(student=t.flip(-1).contiguous(), teacher=t),
        same_as(lambda t=teacher: step(student=t.flip(-1).contiguous(), teacher=t.clone())),
    )
WIDE = torch.rand(8, 3, generator=_generator)
for words, weight in (
    ("w[::2]", WIDE[:, 0].contiguous()[::2]), ("W[:, 1]", WIDE[:4, 1]),
    ("w[:1].expand(n)", WIDE[0, :1].expand(4)), ("a lazy negation", torch._neg_view(W)),
):  # fmt: skip
    add(f"weight: {words}", lambda w=weight: dkd(weight=w), same_as(lambda w=weight: dkd(weight=w.clone())))
LABELS = torch.tensor([[0, 9], [5, 9], [2, 9], [3, 9]])
for words, target in (
    ("y[::2]", LABELS.flatten()[::2]),
    ("Y[:, 0]", LABELS[:, 0]),
    ("expanded", Y[:1].expand(4)),
):
    add(f"target: {words}", lambda y=target: dkd(target=y), same_as(lambda y=target: dkd(target=y.clone())))

# Kinds of tensor --------------------------------------------------------------------------------------------
add = group("Kinds of tensor", LINES)
for words, wrap, view in (
    ("a subclass written in Python", lambda x: x.as_subclass(Subclass), lambda x: x.as_subclass(Subclass)),
    ("nn.Parameter", lambda x: torch.nn.Parameter(x, requires_grad=False), lambda x: x),
    (
        "torchvision's tv_tensors",
        lambda x: x.as_subclass(tv_tensors.Image),
        lambda x: x.as_subclass(tv_tensors.Image),
    ),
):
    add(f"student and teacher: {words}", lambda w=wrap, v=view: step(teacher=w(T), view=v), same_as(step))
    add(f"target: {words}", lambda w=wrap: dkd(target=w(Y)), same_as(dkd))
    add(f"weight: {words}", lambda w=wrap: dkd(weight=w(W)), same_as(lambda: dkd(weight=W)))
KINDS: tuple[tuple[str, Callable[[torch.Tensor], Any], str], ...] = (
    ("DTensor", as_dtensor, "to_local|full_tensor"),
    ("sparse COO", lambda x: x.to_sparse(), "to_dense"),
    ("sparse CSR", lambda x: x.view(len(x), -1).to_sparse_csr(), "to_dense"),
    ("nested", jagged, ""),
    ("MaskedTensor", lambda x: masked_tensor(x, torch.ones_like(x, dtype=torch.bool)), ""),
    ("a wrapper without storage of its own", WithoutStorage.of, ""),
)
for words, wrap, advice in KINDS:
    for argument, call in (
        ("student_logits", lambda w=wrap: fastkd.dkd_loss(w(S), T, Y)),
        ("teacher_logits", lambda w=wrap: fastkd.dkd_loss(S, w(T), Y)),
        ("target", lambda w=wrap: fastkd.dkd_loss(S, T, w(Y))),
        ("weight", lambda w=wrap: fastkd.dkd_loss(S, T, Y, weight=w(W))),
    ):
        if words == "sparse CSR" and argument in ("target", "weight"):
            continue  # it has two dimensions
        named = "(student_logits|teacher_logits)" if argument == "teacher_logits" else argument
        add(f"{argument}: {words}", call, Refused(TypeError, f"^{named}.*{advice}"))
add(
    "student, teacher and target: DTensor",
    lambda: fastkd.dkd_loss(as_dtensor(S), as_dtensor(T), as_dtensor(Y)),
    Refused(TypeError, "^student_logits.*(to_local|full_tensor)"),
)
add(
    "in lists of pairs: DTensor",
    lambda: fastkd.kd_loss([S, as_dtensor(S)], [T, T]),
    Refused(TypeError, r"^student_logits\[1\].*(to_local|full_tensor)"),
)
add(
    "student: quantised",
    lambda: fastkd.kd_loss(torch.quantize_per_tensor(S, 0.1, 0, torch.quint8), T),
    Refused(TypeError, "^student_logits"),
)
SHAPES_ALONE = Gives("no numbers, the shapes of the loss and of the gradient", holds=lambda r: r)
add("all arguments: FakeTensor", lambda: nothing_real(faked, S, T, Y, W), SHAPES_ALONE)


def of_meta() -> bool:
    return nothing_real(lambda x: x.to("meta"), S, T, Y, W)


add("all arguments: meta", of_meta, Refused(BackendUnavailable, "on meta"), ("native", "triton"))
add("all arguments: meta, no backend named", lambda: auto(of_meta), SHAPES_ALONE, ("eager",))


add = group("Transforms of torch.func, forward-mode AD", LINES)
for words, (call, names) in TRANSFORMS.items():
    add(
        f"{words}, no backend named",
        lambda c=call: auto(lambda: c(S, T)),
        same_as(lambda c=call: c(S, T), "its value, by the eager backend"),
        ("eager",),
    )
    add(
        f"{words}, a backend named",
        lambda c=call: c(S, T),
        Refused(BackendUnavailable, f"(?i){names}"),
        FUSED,
    )
add("torch.func.functional_call", functional_call, same_as(functional_call))
add("create_graph=True", second_derivative, Refused(RuntimeError, "create_graph"), FUSED)

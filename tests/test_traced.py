"""Losses in exported and compiled code and in transforms: sizes that vary, labels that cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import LinearLogits

Call = Callable[..., Tensor]
STUDENT, TEACHER = torch.randn(6, 9), torch.randn(6, 9)
TARGET = torch.tensor([0, 3, 99, 8, 2, -7])  # two of them are no labels
WRONG = torch.tensor([False, False, True, False, False, True])


def known(student: Tensor, teacher: Tensor) -> Tensor:
    return fastkd.kd_loss(student, fastkd.top_k(teacher, 4, temperature=4.0))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("call", [fastkd.kd_loss, known], ids=["all", "top-k"])
def test_exported_for_any_number_of_rows(call: Call, reduction: str, strict: bool) -> None:
    class Loss(torch.nn.Module):
        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            if call is known:
                return known(student, teacher)
            return call(student, teacher, reduction=reduction)

    rows = torch.export.Dim("rows", min=2, max=1000)
    program = torch.export.export(Loss(), (STUDENT, TEACHER), dynamic_shapes=[{0: rows}] * 2, strict=strict)
    more = torch.randn(11, 9), torch.randn(11, 9)
    torch.testing.assert_close(program.module()(*more), Loss()(*more))


def test_top_k_is_compiled_once_for_all_numbers_of_rows() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(known, backend=backend, dynamic=True, fullgraph=True)
    for rows in range(3, 14):
        student, teacher = torch.randn(rows, 9), torch.randn(rows, 9)
        torch.testing.assert_close(compiled(student, teacher), known(student, teacher))
    assert len(graphs) == 1


def by_vmap(student: Tensor) -> Tensor:
    def one(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return fastkd.dkd_loss(student[None], teacher[None], target[None], reduction="none")[0]

    return torch.func.vmap(one)(student, TEACHER.to(student.dtype), TARGET)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_label_gives_a_nan_row_where_labels_cannot_be_read(dtype: torch.dtype) -> None:
    """In plain torch too, whose gather would stop there: on a GPU with the loss of the process."""
    student = STUDENT.to(dtype).requires_grad_()
    losses = by_vmap(student)
    assert torch.equal(losses.isnan(), WRONG)
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    assert torch.equal(gradient.isnan().all(-1), WRONG)
    assert gradient[~WRONG].isfinite().all()


def test_forms_have_keys() -> None:
    """Which torch.export and ``tree_map_with_path`` name the tensors by."""

    class Loss(torch.nn.Module):
        def forward(self, student: LinearLogits, teacher: Tensor) -> Tensor:
            return fastkd.kd_loss(student, teacher)

    form = LinearLogits(torch.randn(6, 3), torch.randn(9, 3), torch.randn(9))
    for teacher in (TEACHER, fastkd.top_k(TEACHER, 4, temperature=4.0)):
        program = torch.export.export(Loss(), (form, teacher), strict=False)
        torch.testing.assert_close(program.module()(form, teacher), Loss()(form, teacher))
    paths = [
        torch.utils._pytree.keystr(path) for path, _ in torch.utils._pytree.tree_flatten_with_path(form)[0]
    ]
    assert paths == [".hidden", ".weight", ".bias"]

"""Large results on Linux: their memory is marked for pages of 2 MB before it is written."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.ops import native

CLASSES = 1 << 16
SMAPS = Path("/proc/self/smaps")

pytestmark = [
    pytest.mark.skipif(native.missing("cpu") is not None, reason="the extension is not built"),
    pytest.mark.skipif(
        not (SMAPS.exists() and Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()),
        reason="the system has no such pages, or does not show them",
    ),
]


def marked(tensor: Tensor) -> bool:
    """Whether the mapping that holds the middle of ``tensor`` has the flag of ``MADV_HUGEPAGE``."""
    address, found = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in SMAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif found and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError(f"no mapping holds {address:#x}")


def logits(rows: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(rows, CLASSES, dtype=dtype)


@pytest.mark.parametrize(("rows", "dtype"), [(128, torch.float32), (256, torch.bfloat16)])
def test_the_gradient_of_logits(rows: int, dtype: torch.dtype) -> None:
    student, teacher = logits(rows, dtype).requires_grad_(), logits(rows, dtype)
    with fastkd.use_backend("native"):
        loss = fastkd.kd_loss(student, teacher, temperature=1.0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.nbytes == 32 << 20
    assert marked(gradient)


def test_the_gradient_of_a_layer() -> None:
    hidden, weight = torch.zeros(4, 128), torch.zeros(CLASSES, 128, requires_grad=True)
    linear = fastkd.LinearLogits(hidden, weight)
    with fastkd.use_backend("native"):
        loss = fastkd.kd_loss(linear, torch.ones(4, CLASSES), temperature=1.0)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert marked(gradient)


def test_small_memory_is_left_alone() -> None:
    size = 32 << 20
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        assert not marked(native.prefer_huge_pages(whole[:-1]))
        assert marked(native.prefer_huge_pages(whole))
        del whole
    assert native.prefer_huge_pages(torch.empty(0)).numel() == 0

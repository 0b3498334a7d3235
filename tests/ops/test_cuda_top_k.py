"""The CUDA kernels for a teacher known at K classes, without a GPU: see test_cuda_kernels.py."""

import pytest
import torch

import fastkd
from fastkd.ops import native
from tests.cuda_emulation import Emulation
from tests.losses import test_top_k as matrix
from tests.losses.test_top_k import (  # noqa: F401
    test_all_known_is_the_dense_loss,
    test_masked_classes,
    test_matches_the_definition,
    test_nan_stays_in_its_row,
    test_rows_longer_than_a_tile,
    test_rows_that_are_not_read_may_hold_anything,
    test_the_cross_entropy_needs_no_known_label,
)


@pytest.fixture
def emulated(emulated_library, monkeypatch):
    """The emulated kernels as the native backend."""
    emulation = Emulation(emulated_library)
    monkeypatch.setattr(native, "row_loss", emulation.row_loss)
    monkeypatch.setattr(native, "scale_rows_", emulation.scale_rows_)
    with fastkd.use_backend("native"):
        yield emulation


@pytest.fixture
def fused(emulated):
    """The tests of the other backends, on the emulated kernels."""
    return "cpu"

"""Cancellation and overflow in the CUDA kernels without a GPU, as in tests/losses/test_numerics.py."""

import pytest
import torch

from tests.cases import each_case
from tests.losses.test_numerics import (
    ALSO_AT_1,
    FINITE_WHERE_BASES_RISE,
    MIXTURES,
    REGIMES,
    STANDARDIZED,
    assert_as_exact,
    assert_close_logits_differ_exactly,
    assert_finite_where_bases_rise,
    assert_gradient_of_denied_class_is_exact,
    assert_mixture_is_as_exact,
    assert_small_divergence_is_exact,
    assert_standardised_gradient_is_exact,
    assert_sums_at_1_are_as_exact,
    each_mixture,
    each_share,
)
from tests.losses.test_top_k_edges import (  # noqa: F401
    test_a_label_far_above_the_other_classes,
    test_a_small_rest_keeps_its_gradient,
    test_a_student_without_unmasked_classes,
    test_sums_at_1_beside_a_large_temperature,
    test_terms_are_weighted_too,
)
from tests.ops.test_cuda_kernels import forced


@pytest.fixture
def fused(emulated):
    """The tests of the other backends, with several vectors per thread: a base rises from one to the next."""
    forced(emulated, 32, 1, 1, 12)
    return "cpu"


@pytest.mark.parametrize("name", ALSO_AT_1)
def test_sums_at_1_of_all_classes(fused, name):
    assert_sums_at_1_are_as_exact(name)


@each_share
@each_mixture
def test_a_mixture_of_any_shares(fused, name, share):
    assert_mixture_is_as_exact(name, share)


@pytest.mark.parametrize("name", FINITE_WHERE_BASES_RISE)
@pytest.mark.parametrize("classes", [40, 1200])
def test_a_base_that_rises_further_than_a_sum_may(emulated, name, classes):
    assert_finite_where_bases_rise(name, classes)


@pytest.mark.parametrize("case", MIXTURES, ids=lambda case: case.name)
def test_a_small_divergence_keeps_its_digits(emulated, case):
    assert_small_divergence_is_exact(case)


@pytest.mark.usefixtures("emulated")
def test_close_logits_differ_exactly():
    assert_close_logits_differ_exactly()


@pytest.mark.parametrize("name", ["tvd", "skew-kl", "skew-kl-0.7"])
def test_a_student_sure_of_what_the_teacher_denies(emulated, name):
    assert_gradient_of_denied_class_is_exact(name)


@pytest.mark.parametrize("case", STANDARDIZED, ids=lambda case: case.name)
def test_the_mean_of_standardised_rows_is_exact(emulated, case):
    assert_standardised_gradient_is_exact(case, 1000)


@each_case
@pytest.mark.parametrize("regime", [regime for regime in REGIMES if regime.startswith("near")])
def test_near_equal_losses_are_as_exact_as_eager(emulated, case, regime):
    assert_as_exact(case, *REGIMES[regime](torch.randn(24, 10), torch.randn(24, 10)))

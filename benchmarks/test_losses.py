"""The suite's cases under pytest-benchmark: ``pytest benchmarks --benchmark-only [--suite full] [-k kd]``.

For its statistics, histograms and comparisons. Here the rounds of a variant are consecutive, whereas
``fastkd bench`` interleaves variants: on a machine that drifts, use the ratios of ``fastkd bench``.
"""

import pytest
import torch

from fastkd.bench import cases, peers
from fastkd.bench.measure import runner

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("suite") == "full"
    suite = list(cases.suite() if full else cases.quick_suite())
    ids = [str(case).replace(" x ", "x").replace(" ", "-") for case in suite]
    metafunc.parametrize("case", suite, ids=ids)


@pytest.fixture(scope="session")
def bound():
    return cases.memory_bound(DEVICE)


@pytest.mark.parametrize("variant", peers.VARIANTS)
def test_loss(benchmark, case, variant, bound):
    absent = peers.not_measured(DEVICE).get(variant) or cases.needs_too_much(case, bound)
    if absent:
        pytest.skip(absent)
    loss = peers.variants(case.loss, {variant}, DEVICE).get(variant)
    if loss is None or isinstance(loss, str):
        pytest.skip(loss or f"{variant} has no {case.loss}, or is the backend that fastkd uses here")
    run, inputs = runner(loss, case.backward), cases.make_inputs(case, DEVICE)

    def call():
        run(inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = str(case)
    benchmark.extra_info.update(bytes=case.bytes, device=DEVICE, torch=torch.__version__)
    benchmark.pedantic(call, rounds=11, warmup_rounds=2)
    torch._dynamo.reset()

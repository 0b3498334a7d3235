"""``fastkd.explain``: paths and memory accesses agree with the plans."""

import importlib
import sys

import pytest
import torch

import fastkd
from fastkd import explanation
from fastkd.ops.plan import Device
from fastkd.ops.team_plan import TeamPlan

H100 = Device(multiprocessors=132)


@pytest.mark.parametrize("loss", explanation.LOSSES)
def test_explanation(fused, loss):
    for classes in (10, 1000, 21841):
        explained = fastkd.explain(128, classes, torch.bfloat16, fused, loss=loss)
        assert explained.backend == fastkd.get_backend()
        assert explained.bytes == explained.accesses * 128 * classes * 2
        assert explained.accesses >= (2 if loss in ("ce", "ce_smoothed") else 3)
        assert 0 < explained.seconds < 10
        for words in (loss, explained.path, f"{explained.tile} classes", "GB/s"):
            assert words in str(explained)


@pytest.mark.skipif(sys.platform != "linux", reason="there is no Triton")
def test_the_path_follows_the_length_of_the_row():
    with fastkd.use_backend("triton"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        assert fastkd.explain(8, 1000, device=device).accesses == 3
        assert fastkd.explain(8, 100_000, device=device).accesses == 5
        assert fastkd.explain(8, 100_000, device=device, loss="jsd").accesses == 7
        explained = fastkd.explain(8, 100_000, device=device, known=64)
        assert (explained.tile, explained.warps) == (2048, 8)


def test_native_cuda_paths_report_what_they_cache():
    def path(loss, rows, classes, dtype=torch.bfloat16):
        return explanation._team_path(explanation._work_of(loss), rows, classes, dtype, H100)

    assert "rows per block" in path("kd", 8192, 10).words
    whole = path("dkd", 4096, 8192)
    assert whole.accesses == 3
    assert "one block" in whole.words
    assert "the row on chip" in whole.words
    partly = path("kd", 4096, 131_072)
    assert "cluster of 4 blocks" in partly.words
    assert 3 < partly.accesses < 5
    assert "read again" in partly.words
    assert path("lskd", 4096, 131_072).accesses == path("jsd", 4096, 131_072).accesses > partly.accesses
    assert path("binary_kl", 256, 1_000_000).accesses == 3


def test_warps_of_a_block():
    for threads, rows, warps in ((256, 1, 8), (8, 16, 4), (2, 1, 1)):
        assert explanation._warps_of(TeamPlan(threads, rows, 1, 1)) == warps


def test_native_cuda_path_of_a_teacher_known_at_some_classes(monkeypatch):
    monkeypatch.setattr(explanation, "device_of", lambda device: H100)
    device = torch.device("cuda")
    path = explanation._top_k_path("kd", 64, "native", 4096, 131_072, torch.bfloat16, device)
    assert path.accesses == 3
    assert path.warps == 8
    assert "256 threads per row" in path.words


def test_bad_input():
    with pytest.raises(ValueError, match="classes 1"):
        fastkd.explain(3, 1)
    with pytest.raises(ValueError, match="rows is 0 and"):
        fastkd.explain(0, 10)
    with pytest.raises(ValueError, match="loss is 'kl'"):
        fastkd.explain(3, 10, loss="kl")
    with pytest.raises(TypeError, match="int64"):
        fastkd.explain(3, 10, torch.int64)


def test_linear_layers(fused):
    explained = fastkd.explain(2048, 50_304, torch.bfloat16, fused, loss="ce_kd", hidden=(256, 512))
    assert 1 < explained.chunk_rows < 2048
    assert explained.held_bytes == 4 * 50_304 * 256 + 4 * 2048 * 256
    assert explained.buffer_bytes == 3 * explained.chunk_rows * 50_304 * 2
    for words in (f"chunks of {explained.chunk_rows} rows", "4 C H bytes", "53.6 MB"):
        assert words in str(explained)
    assert fastkd.explain(2048, 50_304, device=fused).chunk_rows is None
    with fastkd.use_backend("eager"):
        assert fastkd.explain(8, 100, device=fused, hidden=(4, 4)).chunk_rows is None
    for wrong in ((0, 4), (4,), (4, 4, 4)):
        with pytest.raises(ValueError, match=r"hidden is .*two whole numbers"):
            fastkd.explain(8, 100, device=fused, hidden=wrong)
    for wrong in (4, "ab", (4.0, 4), (True, 4)):
        with pytest.raises(TypeError, match=r"hidden is .*two whole numbers"):
            fastkd.explain(8, 100, device=fused, hidden=wrong)


@pytest.mark.parametrize("loss", ["kd", "ce", "binary_kl"])
def test_buffers_of_linear_layers_are_what_a_step_takes(loss):
    """Peak above the inputs: the buffers, and what is held; on the native backend."""
    from fastkd.bench.protocol import make_clock
    from fastkd.losses.cases import call_of
    from fastkd.ops.spec import CASES

    rows, classes, widths = 64, 8192, (8, 16)
    student, teacher = (
        fastkd.LinearLogits(torch.randn(rows, width), torch.randn(classes, width)) for width in widths
    )
    tensors = [tensor.requires_grad_() for tensor in student.tensors.values()]
    call, target = call_of(CASES[loss.replace("_", "-")][1]), torch.zeros(rows, dtype=torch.int64)
    with fastkd.use_backend("native"):
        explained = fastkd.explain(rows, classes, loss=loss, hidden=widths)
        peak = make_clock("cpu").extra_memory(
            lambda: torch.autograd.grad(call(student, teacher, target), tensors)
        )
    assert peak == pytest.approx(explained.buffer_bytes + explained.held_bytes, rel=0.02)


def test_importing_the_module_keeps_the_function():
    importlib.import_module("fastkd.explanation")
    assert fastkd.explain is explanation.explain


def test_names_with_either_dash():
    assert fastkd.explain(8, 100, loss="ce-kd").accesses == fastkd.explain(8, 100, loss="ce_kd").accesses


def test_a_teacher_known_at_some_classes(fused):
    explained = fastkd.explain(4, 5000, device=fused, known=64)
    assert explained.accesses <= fastkd.explain(4, 5000, device=fused).accesses
    assert "all but 64" in str(explained)
    layer = fastkd.explain(4, 5000, device=fused, known=64, hidden=(8, 8))
    assert layer.buffer_bytes == 2 * 4 * 5000 * 4  # the student's logits of a chunk, and their gradient
    with pytest.raises(ValueError, match=r"binary_kl.*not defined"):
        fastkd.explain(4, 5000, device=fused, loss="binary_kl", known=64)
    with pytest.raises(ValueError, match="known is 0; expected 1 to 5000"):
        fastkd.explain(4, 5000, device=fused, known=0)


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ("native", "auto: measured to be faster for such rows"),
        ("triton", "auto: native is not measured to be faster for such rows"),
    ],
)
def test_the_choice_of_auto_on_a_gpu_has_its_reason(monkeypatch, chosen, reason):
    monkeypatch.setattr(explanation, "device_of", lambda device: H100)
    monkeypatch.setattr(explanation, "copy_bandwidth", lambda device: 1e12)
    monkeypatch.setattr(explanation.backend, "checked_device", lambda device, name: torch.device(device))
    monkeypatch.setattr(explanation.backend, "resolve", lambda *_: "triton")
    monkeypatch.setattr(explanation.backend, "faster_for", lambda *_: chosen)
    explained = fastkd.explain(4096, 131_072, torch.bfloat16, "cuda")
    assert f"backend {chosen} ({reason})\n" in str(explained)


@pytest.fixture
def slow_copy(monkeypatch):
    """A copy moves 1 GB/s, and four threads share a call."""
    monkeypatch.setattr(explanation, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    with fastkd.use_backend("native"):
        yield


def test_units(slow_copy):
    text = str(fastkd.explain(1000, 1000))
    assert "3 accesses per element, 12.0 MB; at the 1 GB/s of a copy measured now about 12.000 ms" in text


@pytest.mark.parametrize(
    ("rows", "classes", "dtype", "more", "accesses"),
    [
        (4, 1000, torch.float32, {}, 3),
        (4, 1000, torch.bfloat16, {}, 3),
        (4, 1000, torch.float16, {}, 5),  # both models are read once more for the gradient
        (4, 1000, torch.float16, {"loss": "ce"}, 3),
        (4, 1000, torch.float16, {"hidden": (8, 8)}, 3),  # which a layer has at once
        # 2^23 exponentials are cached per thread: of float32 in the gradient's place, else of both models.
        (4, 5_000_000, torch.float32, {}, 3),
        (4, 5_000_000, torch.bfloat16, {}, 5),
        (2, 5_000_000, torch.float32, {}, 5),  # of all rows, where threads share each
        (4, 10_000_000, torch.float16, {}, 7),
        (4, 10_000_000, torch.float32, {"loss": "binary_kl"}, 3),
        (4, 1000, torch.float32, {"known": 64}, 2),
        (4, 1000, torch.float16, {"known": 64}, 3),
        (4, 10_000_000, torch.float32, {"known": 64}, 3),
    ],
)
def test_accesses_on_a_cpu(slow_copy, rows, classes, dtype, more, accesses):
    assert fastkd.explain(rows, classes, dtype, **more).accesses == accesses


def test_how_threads_share_rows(slow_copy):
    assert "rows over threads" in fastkd.explain(4, 100).path
    assert "each row over several threads" in fastkd.explain(3, 100).path


def test_passes_of_triton_over_long_rows():
    def path(loss):
        return explanation._triton_path(explanation._work_of(loss), 4096, 100_000, torch.bfloat16, H100)

    assert [path(loss).accesses for loss in ("kd", "lskd", "jsd", "ce", "binary_kl")] == [5, 7, 7, 3, 3]
    assert "3 passes over tiles, 264 rows at a time" in path("lskd").words


def test_the_bandwidth_is_the_median_of_nine_copies_after_two(monkeypatch):
    times = [50.0, 60.0, 9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0]
    ticks = iter([tick for duration in times for tick in (0.0, duration)])
    monkeypatch.setattr(explanation.time, "perf_counter", lambda: next(ticks))
    assert explanation.copy_bandwidth.__wrapped__("cpu") == 2 * 2**26 / 5.0

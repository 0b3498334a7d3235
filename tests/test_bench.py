"""The benchmark suite: every field of a record, its files, its report and its comparison."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkd.bench import cases, command, forms, measure, peers, protocol, results
from fastkd.bench.compare import compare
from fastkd.bench.protocol import relative_error
from fastkd.bench.report import peer_wins, write_report

FIELDS = {
    "kind", "loss", "rows", "classes", "dtype", "pass", "variant", "ms", "p20", "p80", "turns", "bytes",
    "bandwidth", "share", "extra_bytes", "gradient_error", "host_us", "clock",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of every loss over both passes, small, eager as the only peer."""
    path = tmp_path_factory.mktemp("bench") / "run.jsonl"
    status = command.main(
        ["--shapes", "4x10", "16x1000", "--dtypes", "float32", "bfloat16", "--peers", "eager",
         "--device", "cpu", "--seconds", "0.02", "--output", str(path)]
    )  # fmt: skip
    assert status == 0
    return path


def test_every_field_of_a_record(run):
    header, records = results.read(run)
    for name in ("device", "name", "torch", "fastkd", "python", "backend", "date", "threads"):
        assert header[name], name
    for name in ("liger", "quack", "compiled", "triton"):
        assert header["not_measured"][name]
    assert len(records) == len(cases.LOSSES) * 2 * 2 * 2 * 2
    for record in records:
        assert record.keys() >= FIELDS
        assert 0 < record["p20"] <= record["ms"] <= record["p80"]
        accesses = 3 if record["pass"] == "forward+backward" else 2
        size = 4 if record["dtype"] == "float32" else 2
        assert record["bytes"] == accesses * size * record["rows"] * record["classes"]
        assert record["share"] == pytest.approx(record["bytes"] / record["ms"] * 1e3 / record["bandwidth"])
        if record["pass"] == "forward":
            assert record["gradient_error"] is None
        else:
            # The released BinaryKL-Norm may be NaN in bfloat16, where 1 - 1e-8 is 1.
            if (record["variant"], record["loss"], size) != ("eager", "binary-kl-norm", 2):
                assert record["gradient_error"] < (1e-4 if record["dtype"] == "float32" else 0.2)
            # At least the gradient.
            assert record["extra_bytes"] >= size * record["rows"] * record["classes"]
        if record["variant"] == "fastkd":
            assert set(record["speedup_over"]) == {"eager"}


@pytest.mark.parametrize("loss", cases.FASTKD)
def test_peers_compute_the_same_loss(loss):
    case = cases.Case(loss, 8, 50, "float32", "forward+backward")
    inputs = cases.make_inputs(case, "cpu")
    gradient = measure.runner(peers.EAGER[loss], True)(inputs)
    assert measure.gradient_error(case, gradient, inputs) < 1e-4
    torch.testing.assert_close(peers.EAGER[loss](*inputs), cases.FASTKD[loss](*inputs), rtol=1e-4, atol=1e-5)


def test_extra_memory_counts_what_lives_at_once():
    def call():
        kept = torch.empty(1000, dtype=torch.uint8)
        for _ in range(3):
            torch.empty(5000, dtype=torch.uint8)
        return kept

    assert protocol.CPUClock().extra_memory(call) == 6000


def test_what_does_not_fit_or_fails_is_reported(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no such instruction\nsecond line")

    monkeypatch.setitem(peers.EAGER, "kd", fails)
    path = tmp_path / "run.jsonl"
    arguments = ["--shapes", "4x10", "64x1000000", "--losses", "kd", "--dtypes", "float32"]
    arguments += ["--passes", "forward", "--peers", "eager"]
    arguments += ["--memory", "1", "--device", "cpu", "--output", str(path)]
    assert command.main(arguments) == 0
    _, records = results.read(path)
    assert [record["kind"] for record in records] == ["loss", "failed", "skipped"]
    assert records[1]["reason"] == "RuntimeError: no such instruction"
    assert "GiB" in records[2]["reason"]
    assert command.main([*arguments[:-1], str(tmp_path / "late.jsonl"), "--time-limit", "0"]) == 0
    said = capsys.readouterr().out
    assert "time limit" in said
    assert "not measured: compiled: not asked for" in said


def test_result_files_are_never_overwritten(run, capsys):
    before = run.read_bytes()
    assert command.main(["--quick", "--device", "cpu", "--output", str(run)]) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert run.read_bytes() == before
    assert command.main(["--report", str(run), "--output", str(run.parent)]) == 2
    absent, folder = run.parent / "nothing.jsonl", run.parent / "report"
    assert command.main(["--report", str(absent), "--output", str(folder)]) == 2
    assert not folder.exists()


def changed(run, path, change):
    """A copy of a result file whose records ``change`` has edited."""
    header, records = results.read(run)
    for record in records:
        change(record)
    write(path, header, records)
    return path


def write(path, header, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in [header, *records]))


def quiet(record):
    record.update(p20=0.99 * record["ms"], p80=1.01 * record["ms"])


def slower(factor, *variants):
    def change(record):
        quiet(record)
        if record["variant"] in variants and record["loss"] == "kd":
            for name in ("ms", "p20", "p80"):
                record[name] *= factor
            record["share"] /= factor

    return change


def drifted(record):
    """Everything is 1.7 times slower."""
    quiet(record)
    for name in ("ms", "p20", "p80"):
        record[name] *= 1.7
    record["bandwidth"] /= 1.7


def inexact(record):
    quiet(record)
    if record["variant"] == "fastkd" and record["gradient_error"] and record["loss"] == "jsd":
        record["gradient_error"] *= 10


def not_a_number(record):
    quiet(record)
    if record["variant"] == "fastkd" and record["gradient_error"] and record["loss"] == "jsd":
        record["gradient_error"] = float("nan")


@pytest.mark.parametrize(
    ("change", "regressions", "said"),
    [
        (quiet, 0, "0 regressions, 0 faster"),
        (drifted, 0, "0 regressions, 0 faster"),
        (slower(1.5, "fastkd"), 8, "slower     kd 4 x 10 float32 forward"),
        (slower(0.5, "fastkd"), 0, "0 regressions, 8 faster"),
        (slower(2.0, "fastkd", "eager"), 0, "0 regressions, 0 faster"),  # the case, not the kernel
        (slower(1.05, "fastkd"), 0, "0 regressions, 0 faster"),
        (inexact, 4, "less exact jsd"),
        (not_a_number, 4, "less exact jsd"),
    ],
)
def test_comparison(run, tmp_path, change, regressions, said):
    old = changed(run, tmp_path / "old.jsonl", quiet)
    new = changed(run, tmp_path / "new.jsonl", change)
    text, found = compare(old, new)
    assert found == regressions, text
    assert said in text
    assert command.main(["--compare", str(old), str(new)]) == (1 if regressions else 0)


def test_noise_hides_a_small_change(run, tmp_path):
    def noisy(record):
        slower(1.3, "fastkd")(record)
        record.update(p20=0.7 * record["ms"], p80=1.4 * record["ms"])

    old = changed(run, tmp_path / "old.jsonl", quiet)
    assert compare(old, changed(run, tmp_path / "new.jsonl", noisy))[1] == 0


def test_report(run, tmp_path):
    pytest.importorskip("matplotlib")
    header, records = results.read(run)
    records = [record for record in records if record["dtype"] == "float32"]
    won, lost = tmp_path / "won.jsonl", tmp_path / "lost.jsonl"
    write(won, header, records)
    records = [record for record in records if record["pass"] == "forward" and record["loss"] == "kd"]
    records[0]["speedup_over"] = {"eager": 0.8}
    split = dict.fromkeys(("data", "teacher", "loss"), 1.0)
    steps = [
        {"kind": "step", "step": "resnet", "batch": 8, "variant": variant, "ms": 3.0, "p20": 3.0, "p80": 3.0,
         "split_ms": {**split, "loss": loss}, "loss_share": loss / (2 + loss)}
        for variant, loss in (("fastkd", 0.02), ("eager", 0.01))
    ]  # fmt: skip
    skipped = {**records[0], "kind": "skipped", "reason": "too large"}
    write(lost, header, [*records, *steps, skipped])
    report = write_report([won, lost], tmp_path / "report")
    text = report.read_text()
    assert text.count("\n## ") == 2
    assert "eager takes 0.80 of fastkd's time" in text
    assert "too small a share for any loss kernel to matter" in text
    assert "a peer wins, eager's loss takes 0.50" in text
    assert "too large" in text
    assert "runs on GPUs only" in text
    pictures = sorted(path.name for path in report.parent.glob("*.png"))
    assert pictures == sorted(
        [
            "run1-times-float32-forward.png",
            "run1-times-float32-forward-backward.png",
            "run1-roofline.png",
            "run2-times-float32-forward.png",
            "run2-roofline.png",
            "run2-steps.png",
        ]
    )
    assert all(name in text for name in pictures)


def test_report_without_matplotlib(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "No pictures" in write_report([run], tmp_path / "report").read_text()


def test_training_step():
    from fastkd.bench.step import PARTS, measure_step

    ours, eager = measure_step("glyph-2263", "cpu", {"eager"}, batch=4, seconds=0.0)
    for record in (ours, eager):
        assert list(record["split_ms"]) == list(PARTS)
        assert record["turns"] == 7
        assert record["loss_share"] == pytest.approx(
            record["split_ms"]["loss"] / sum(record["split_ms"].values())
        )


def test_forms(tmp_path, capsys):
    """Each variant is the same loss; without stored logits it takes less memory."""
    path = tmp_path / "run.jsonl"
    arguments = [
        "--forms",
        "--shapes",
        "256x4000",
        "2000000x4000",
        "--losses",
        "kd",
        "jsd",
        "ce",
        "--memory",
        "1",
    ]
    arguments += ["--peers", "stored", "eager", "torch", "--seconds", "0", "--device", "cpu"]
    assert command.main([*arguments, "--output", str(path)]) == 0
    header, records = results.read(path)
    assert header["not_measured"]["compiled"]
    assert sum(record["kind"] == "skipped" for record in records) == 3
    limited = ["--time-limit", "0", "--output", str(tmp_path / "limited.jsonl")]
    assert command.main([*arguments, *limited]) == 0
    assert {record["kind"] for record in results.read(tmp_path / "limited.jsonl")[1]} == {"skipped"}
    by_variant = {(r["loss"], r["variant"]): r for r in records if r["kind"] == "form"}
    assert set(by_variant) == {
        *((loss, variant) for loss in ("kd", "jsd", "ce") for variant in ("fastkd", "stored", "eager")),
        *([("ce", "torch")] if "torch" not in header["not_measured"] else []),
    }
    for record in by_variant.values():
        assert record["gradient_error"] < 1e-4
        assert 0 < record["p20"] <= record["ms"] <= record["p80"]
    assert "2000000 x (256, 512) x 4000 float32" in capsys.readouterr().out
    text = write_report([path], tmp_path / "report").read_text()
    assert "| kd | 256 x (256, 512) x 4000 | float32 | fastkd |" in text
    assert "nothing could be compared" in compare(path, path)[0]


@pytest.mark.parametrize("name", ["kd", "ce-kd", "ce", "dkd", "jsd"])
@pytest.mark.parametrize(
    ("package", "maker"),
    [
        ("liger_kernel", forms.liger),
        ("trl", forms.trl),
        ("orda_kernel", lambda name: forms.orda(name, backend="torch")),
    ],
    ids=["liger", "trl", "orda"],
)
def test_peers_of_linear_layers_compute_the_same_loss(package, maker, name):
    pytest.importorskip(package)
    case = forms.Case(name, 16, 300, 8, 12, "float32")
    layers = forms.make_layers(case, "cpu")
    if (loss := maker(name)) is None:
        return
    for found, true in zip(forms.gradients(loss, layers), forms.truth_of(case, layers), strict=True):
        assert relative_error(found, true) < 1e-5


def test_peers_that_run_on_gpus_only_are_named():
    assert "GPUs only" in forms.not_measured("cpu")["orda"]
    on_gpu = forms.not_measured("cuda")
    assert ("orda" in on_gpu) == (importlib.util.find_spec("orda_kernel") is None)
    assert "orda_kernel is not installed" in on_gpu.get("orda", "orda_kernel is not installed")


def test_throughput_of_the_trainer(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks/throughput.py"
    output = tmp_path / "run.jsonl"
    command = [
        sys.executable, script, "--output", output, "--device=cpu", "--precision=float32", "--size=32",
        "--batch=2", "--classes=10", "--steps=1", "--warm-up=1", "--turns=1", "--no-channels-last",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    _, records = results.read(output)
    assert [record.get("variant") for record in records] == ["trainer", "bare", "plain", None]
    assert sum(records[0]["split"].values()) == pytest.approx(1)
    assert all(record["images_per_second"] > 0 for record in records[:3])
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "results are never overwritten" in again.stderr


def test_measuring_needs_torch_alone(tmp_path):
    """A GPU machine may have nothing else: what only reports and recipes need must not be imported."""
    code = (
        "import sys\n"
        "for name in 'matplotlib rich pydantic yaml fontTools torchvision pytest hypothesis'.split():\n"
        "    sys.modules[name] = None\n"
        "from fastkd import check\n"
        "from fastkd.bench import command\n"
        "assert check.main(['--losses', 'binary_kl_norm_loss']) == 0\n"
        "sys.exit(command.main(['--shapes', '4x10', '--losses', 'kd', '--peers', 'eager', '--device', 'cpu',"
        " '--seconds', '0.01', '--output', sys.argv[1]]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run.jsonl")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_no_case_of_fastkds_is_no_praise():
    eager = {
        "loss": "kd",
        "rows": 4,
        "classes": 10,
        "dtype": "float32",
        "pass": "forward",
        "variant": "eager",
    }
    assert peer_wins([eager]) == "**fastkd has no time in any of these cases.**\n"

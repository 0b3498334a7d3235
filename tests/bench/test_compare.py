"""What a comparison flags, against which yardstick, and beyond which noise."""

import json

import pytest

from fastkd.bench import compare

CASE = {"kind": "loss", "loss": "kd", "rows": 8, "classes": 100, "dtype": "float32", "pass": "forward"}


def record(variant="fastkd", ms=1.0, spread=0.03, share=0.5, error=None, **more):
    low, high = ms * (1 - spread), ms * (1 + spread)
    times = {"ms": ms, "p20": low, "p80": high, "share": share, "gradient_error": error}
    return {**CASE, "variant": variant, **times, **more}


def verdict(old, new):
    return compare._verdict(*({one["variant"]: one for one in records} for records in (old, new)))


@pytest.mark.parametrize(("ratio", "kind"), [(1.115, None), (1.125, "slower"), (0.9, None), (0.88, "faster")])
def test_noise_against_the_copy_is_the_sum_of_both(ratio, kind):
    """Half of p20 to p80 of each, 3 % here: 12 % is twice that of both."""
    found = verdict([record()], [record(ms=ratio, share=0.5 / ratio)])
    assert (found and found[0]) == kind
    if found:
        assert found[1] == f"{ratio:.2f} of the old time, against the copy (beyond the noise: 1.12)"


@pytest.mark.parametrize(("ratio", "kind"), [(1.13, None), (1.15, "slower")])
def test_noise_against_a_peer_is_that_of_all_four(ratio, kind):
    """2 sqrt(2 0.03^2 + 2 0.04^2) = 14.1 %; the copy moved more, so that the peer decides."""
    old = [record(), record("eager", 3.0, spread=0.04)]
    new = [record(ms=ratio, share=0.3), record("eager", 3.0, spread=0.04)]
    found = verdict(old, new)
    assert (found and found[0]) == kind
    assert found is None or "against eager (beyond the noise: 1.14)" in found[1]


@pytest.mark.parametrize("variant", ["native", "triton", "fastkd-compiled", "quack"])
def test_what_is_no_yardstick(variant):
    """Variants of fastkd itself became slower with it, and quack is another loss."""
    slower = verdict([record(), record(variant, 2.0)], [record(ms=1.5, share=0.33), record(variant, 3.0)])
    assert slower is not None
    assert slower[0] == "slower"


def test_all_yardsticks_must_agree():
    assert verdict([record(), record("eager")], [record(ms=1.5, share=0.33), record("eager", 1.6)]) is None
    # By more than the noise, but against the copy it is faster.
    assert verdict([record(), record("eager")], [record(ms=1.3, share=0.75), record("eager")]) is None


@pytest.mark.parametrize(
    ("before", "now", "flagged"),
    [
        (1e-6, 1.9e-6, False),
        (1e-6, 2.1e-6, True),
        (1e-9, 1.9e-7, False),
        (1e-9, 2.1e-7, True),
        (None, 1.0, False),
    ],
)
def test_gradient_errors_that_doubled(before, now, flagged):
    found = verdict([record(error=before)], [record(error=now)])
    assert (found is not None and found[0] == "less exact") == flagged


def test_failures():
    failed = {**CASE, "kind": "failed", "variant": "fastkd", "reason": "OutOfMemoryError: 2 GiB"}
    assert verdict([record()], [failed]) == ("slower", "failed: OutOfMemoryError: 2 GiB")
    assert verdict([failed], [record()]) is None
    assert verdict([record("eager")], [record("eager")]) is None


@pytest.fixture
def file(tmp_path):
    def write(name, device, *records):
        path = tmp_path / f"{name}.jsonl"
        header = {"kind": "header", "name": device}
        path.write_text("".join(json.dumps(one) + "\n" for one in (header, *records)))
        return path

    return write


def test_cases_of_one_file_and_devices(file):
    old = file(
        "old",
        "A",
        record(),
        record(rows=9),
        record(rows=10),
        record("eager", rows=11),
        {**CASE, "kind": "skipped"},
    )
    new = file("new", "B", record(), record(rows=12))
    text, regressions = compare.compare(old, new)
    assert "1 cases in both, 2 only in the old, 1 only in the new: 0 regressions, 0 faster" in text
    assert "the devices differ" in text
    assert regressions == 0
    assert "the devices differ" not in compare.compare(old, old)[0]
    assert "nothing could be compared" not in text


def test_no_time_of_fastkd_is_nothing_to_compare(file):
    """Not even if both files have the case, of a peer or as a failure."""
    failed = {**CASE, "kind": "failed", "variant": "fastkd", "reason": "OutOfMemoryError: 2 GiB"}
    for number, records in enumerate(([], [failed], [record("eager")])):
        one = file(f"run{number}", "A", *records)
        assert compare.compare(one, one)[0].endswith("nothing could be compared")

"""What the curves of a report show: the numbers of the records, with the right words beside them."""

import pytest

pytest.importorskip("matplotlib")

from fastkd.bench import pictures

CLASSES = (10, 100, 1000, 10_000)


def record(variant, mode, classes):
    return {
        "kind": "loss", "loss": "kd", "rows": 8, "classes": classes, "dtype": "bfloat16", "pass": mode,
        "variant": variant, "ms": 0.5 * classes, "p20": 0.4 * classes, "p80": 0.6 * classes,
        "bytes": 1000 * classes, "bandwidth": 1e9, "extra_bytes": 3000 * classes,
    }  # fmt: skip


def curves(axes):
    return {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}


@pytest.mark.parametrize(
    ("mode", "words", "floor"),
    [
        ("forward+backward", "ms, loss and gradient", "floor: three accesses, or the gradient"),
        ("forward", "ms, loss alone", "floor: two accesses"),
    ],
)
def test_curves_over_the_classes(mode, words, floor, tmp_path, monkeypatch):
    figures = []
    make = pictures._figure
    monkeypatch.setattr(pictures, "_figure", lambda *size: figures.append(make(*size)) or figures[-1])
    rows = [record(variant, mode, classes) for classes in CLASSES[::-1] for variant in ("eager", "fastkd")]
    rows.append({**record("triton", mode, 10), "extra_bytes": None})
    drawn = pictures._of_rows(rows, "a device", tmp_path, "run1")
    assert [path.name for _, path in drawn] == ["run1-kd-8-light.png", "run1-kd-8-dark.png"]
    assert all(path.exists() for _, path in drawn)
    times, memory = figures[0].axes
    assert times.get_ylabel() == words
    assert curves(times)["fastkd"] == curves(times)["eager"] == [0.5 * classes for classes in CLASSES]
    assert curves(times)[floor] == pytest.approx([1e-3 * classes for classes in CLASSES])
    assert curves(memory)["eager"] == pytest.approx([3e-3 * classes for classes in CLASSES])
    # The gradient is the least that a call must allocate; the loss alone has none.
    least = [values for label, values in curves(memory).items() if label.startswith("_")]
    assert least == ([pytest.approx([16e-6 * classes for classes in CLASSES])] if "+" in mode else [])


def test_few_points_are_no_curve(tmp_path):
    rows = [record("fastkd", "forward", classes) for classes in CLASSES[1:]]
    assert pictures._of_rows(rows, "a device", tmp_path, "run1") == []

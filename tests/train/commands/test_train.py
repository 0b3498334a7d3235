"""The command `fastkd train`: complete runs on real fonts, small enough to take a second each."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import matplotlib.image
import pytest
import torch

from fastkd.cli import main
from fastkd.models import GlyphCNN
from fastkd.train.run.checkpoint import save_checkpoint
from tests.small_fonts import tiny_student
from tests.train.tiny import without_time

pytestmark = pytest.mark.usefixtures("workplace")


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, weights_only=True)
    return content.get("model", content.get("student"))


def same_weights(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_run_from_nothing(tiny: list[str], workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "glyphs/kd", *tiny]) == 0
    out = capsys.readouterr().out
    run = workplace / "runs" / "glyphs-kd-001"
    assert {path.name for path in run.iterdir()} == {
        "recipe.yaml",
        "run.json",
        "last.pt",
        "previous.pt",
        "best.pt",
        "metrics.jsonl",
        "curves.png",
        "summary.json",
    }
    history = metrics(run)
    assert [record["epoch"] for record in history] == [1, 2, 3]
    assert set(history[0]["terms"]) == {"ce", "kd"}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["last"]["val_accuracy"] == history[-1]["val_accuracy"]
    assert summary["best"]["val_accuracy"] == max(record["val_accuracy"] for record in history)
    assert matplotlib.image.imread(run / "curves.png").std() > 0.05
    (teacher,) = (workplace / "runs" / "teachers").iterdir()
    assert (teacher / "teacher.pt").exists()
    for part in (
        "teacher epoch 2/2",
        "student epoch 3/3",
        "student alone",
        "not known",
        "best epoch",
        "loss",
    ):
        assert part in out
    assert "fastkd train glyphs/student" in out
    assert "run folder: runs/glyphs-kd-001" in out


def test_a_second_run_reuses_the_teacher_and_is_the_same(
    tiny: list[str], workplace: Path, capsys: pytest.CaptureFixture[str], fonts: Path
) -> None:
    assert main(["train", "glyphs/student", *tiny_student(fonts)]) == 0
    assert main(["train", "glyphs/kd", *tiny]) == 0
    capsys.readouterr()
    runs = workplace / "runs"
    assert main(["train", str(runs / "glyphs-kd-001" / "recipe.yaml")]) == 0
    out = capsys.readouterr().out
    assert "teacher epoch" not in out
    assert "not known" not in out
    alone = metrics(runs / "glyphs-student-001")[-1]["val_accuracy"]
    assert f"{100 * alone:.2f}" in out
    assert len(list((runs / "teachers").iterdir())) == 1
    first, second = runs / "glyphs-kd-001", runs / "glyphs-kd-002"
    assert same_weights(first / "last.pt", second / "last.pt")
    assert without_time(metrics(first)) == without_time(metrics(second))
    assert (first / "recipe.yaml").read_text() == (second / "recipe.yaml").read_text()


def test_other_data_or_settings_get_another_teacher(tiny: list[str], workplace: Path) -> None:
    short = [*tiny, "train.epochs=1", "teacher.epochs=1"]
    for more in ([], ["data.characters=41-5A"], ["data.augment=0.5"], ["teacher.seed=1"], ["train.seed=5"]):
        assert main(["train", "glyphs/kd", *short, *more]) == 0
    assert (
        len(list((workplace / "runs" / "teachers").iterdir())) == 4
    )  # another student seed: the same teacher


@pytest.mark.parametrize("name", ["dkd", "lskd", "binary-kl-norm", "dckd", "dhkd", "mhkd"])
def test_the_other_recipes_train(tiny: list[str], workplace: Path, name: str) -> None:
    assert main(["train", f"glyphs/{name}", *tiny, "train.epochs=1", "teacher.epochs=1"]) == 0
    (record,) = metrics(workplace / "runs" / f"glyphs-{name}-001")
    expected = {
        "dkd": {"ce", "tckd", "nckd"},
        "lskd": {"ce", "kd"},
        "dckd": {"ce", "tckd", "nckd", "hint"},
        "dhkd": {"ce", "binary_kl_norm"},
        "mhkd": {"ce", "kd", "head_ce", "head_kd", "teacher_head_ce"},
        "binary-kl-norm": {"ce", "binary_kl_norm"},
    }
    assert set(record["terms"]) == expected[name]


def test_seeds(workplace: Path, fonts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Words after an option belong to the recipe too.
    arguments = [*tiny_student(fonts), "train.epochs=1", "train.seed=4"]
    assert main(["train", "glyphs/student", "--seeds", "3", *arguments]) == 0
    out = capsys.readouterr().out
    group = workplace / "runs" / "glyphs-student-001"
    last = [100 * metrics(group / f"seed-{seed}")[-1]["val_accuracy"] for seed in (4, 5, 6)]
    assert f"{statistics.mean(last):.2f} ± {statistics.stdev(last):.2f}" in out
    assert "seeds 4, 5, 6" in out
    assert not same_weights(group / "seed-4" / "last.pt", group / "seed-5" / "last.pt")

    # A stopped group is resumed with the missing runs, and ends the same.
    (group / "seed-6" / "summary.json").unlink()
    (group / "seed-6" / "last.pt").unlink()
    untouched = (group / "seed-5" / "last.pt").stat().st_mtime_ns
    assert main(["train", "--resume", str(group)]) == 0
    assert f"{statistics.mean(last):.2f} ± {statistics.stdev(last):.2f}" in capsys.readouterr().out
    assert (group / "seed-5" / "last.pt").stat().st_mtime_ns == untouched

    # The recipe finds the group, as it finds a run.
    (group / "seed-6" / "summary.json").unlink()
    before = {path.name for path in group.iterdir()}
    assert main(["train", "glyphs/student", *arguments, "--resume"]) == 0
    assert "resuming runs/glyphs-student-001" in capsys.readouterr().out
    assert (group / "seed-6" / "summary.json").exists()
    assert {path.name for path in group.iterdir()} == before
    assert [path.name for path in (workplace / "runs").iterdir()] == ["glyphs-student-001"]
    assert main(["train", "--resume", str(group), "--eval-only"]) == 2
    assert "is a group of seeds; name one of its runs" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_seeds_that_are_stopped_name_their_group(
    number: signal.Signals, status: int, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop_after_an_epoch() -> None:
        while not any(workplace.glob("my runs/*/seed-0/metrics.jsonl")):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    words = ["data.synthetic=40", "student.width=2", "train.epochs=3000", "train.device=cpu", "--seeds", "2"]
    words += ["--runs", "my runs"]
    thread = threading.Thread(target=stop_after_an_epoch, daemon=True)
    thread.start()
    assert main(["train", "fashion-mnist/student", *words]) == status
    thread.join()
    command = shlex.split(capsys.readouterr().err.partition("to resume: ")[2])  # as a shell reads it
    assert command == ["fastkd", "train", "--resume", "my runs/fashion-mnist-student-001"]


def test_seeds_of_different_lengths_are_said(
    workplace: Path, fonts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*tiny_student(fonts), "train.epochs=1", "train.schedule=constant"]
    assert main(["train", "glyphs/student", "--seeds", "2", *arguments]) == 0
    assert "different settings" not in capsys.readouterr().out
    group = "runs/glyphs-student-001"
    assert main(["train", "--resume", f"{group}/seed-0", "train.epochs=2"]) == 0
    assert main(["train", "--resume", group]) == 0
    assert "had different settings (epochs: seed 0: 2, seed 1: 1)" in capsys.readouterr().out


def test_a_run_outlives_the_file_of_its_teachers_heads(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "fashion-mnist/mhkd", "data.synthetic=20", "student.width=2", "teacher.width=3", "teacher.epochs=1",
        "train.batch_size=10", "train.device=cpu", "train.threads=1", "train.epochs=1", "method.head_width=4",
        "train.schedule=constant",
    ]  # fmt: skip
    assert main(["train", *words]) == 0
    shutil.copy("runs/fashion-mnist-mhkd-001/last.pt", "heads.pt")
    first = ["train", "--resume", "runs/fashion-mnist-mhkd-001", "method.teacher_heads=heads.pt"]
    assert main(first) == 2  # its own were trained
    assert "not set → " in capsys.readouterr().err
    assert main(["train", *words, "method.teacher_heads=heads.pt"]) == 0
    Path("heads.pt").unlink()
    second = "runs/fashion-mnist-mhkd-002"
    assert main(["train", "--resume", second, "train.epochs=2"]) == 2
    assert "a run that used them has them in its last.pt" in capsys.readouterr().err
    own = f"method.teacher_heads={second}/last.pt"
    assert main(["train", "--resume", second, "train.epochs=2", own]) == 0


def test_seeds_of_unusable_data_leave_nothing(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "fashion-mnist/kd", "--seeds", "2"]) == 2
    err = capsys.readouterr().err
    assert "data.folder is missing" in err
    assert "earlier epochs" not in err
    assert not (workplace / "runs").exists()


def test_resuming_from_within_a_run_folder(
    tiny: list[str], workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ["train.epochs=1", "teacher.epochs=1", "train.schedule=constant"]
    assert main(["train", "glyphs/kd", *tiny, *short, "--seeds", "1"]) == 0
    group = workplace / "runs" / "glyphs-kd-001"
    for place, folder, epochs in ((group / "seed-0", ".", 2), (group, "seed-0", 3), (group, ".", None)):
        monkeypatch.chdir(place)
        words = [] if epochs is None else [f"train.epochs={epochs}"]
        capsys.readouterr()
        assert main(["train", "--resume", folder, *words]) == 0
        assert "teacher epoch" not in capsys.readouterr().out
        assert [path.name for path in workplace.rglob("teachers")] == ["teachers"]
    assert len(metrics(group / "seed-0")) == 3
    assert main(["train", "glyphs/kd", *tiny, *short, "--seeds", "2", "--resume"]) == 2
    assert "leave out --seeds to resume the newest run or group" in capsys.readouterr().err


def test_an_extended_run_is_found_by_its_recipe(
    workplace: Path, fonts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["glyphs/student", *tiny_student(fonts), "train.schedule=constant"]
    assert main(["train", *arguments, "train.epochs=1"]) == 0
    for epochs in (2, 3):
        assert main(["train", "--resume", "runs/glyphs-student-001", f"train.epochs={epochs}"]) == 0
    capsys.readouterr()
    assert main(["train", *arguments, "train.epochs=3", "--resume"]) == 0
    assert "resuming runs/glyphs-student-001" in capsys.readouterr().out


@pytest.mark.parametrize("during", ["teacher", "student"])
def test_ctrl_c_and_going_on(tiny: list[str], workplace: Path, during: str) -> None:
    epochs = {"teacher": (2, 25), "student": (25, 1)}[during]
    long = [*tiny, "data.characters=41-5A", f"train.epochs={epochs[0]}", f"teacher.epochs={epochs[1]}"]
    command = [sys.executable, "-m", "fastkd", "train", "glyphs/kd", *long]
    root = str(Path(__file__).resolve().parents[3])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A test run in the background ignores SIGINT, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    pattern = "runs/teachers/*/metrics.jsonl" if during == "teacher" else "runs/glyphs-kd-001/metrics.jsonl"
    deadline = time.monotonic() + 90
    while not any(workplace.glob(pattern)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no epoch was finished"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "fastkd train --resume runs/glyphs-kd-001" in errors

    run = workplace / "runs" / "glyphs-kd-001"
    (stopped,) = workplace.glob(pattern)
    done = len(stopped.read_text().splitlines())
    assert 1 <= done < 25
    assert not (run / "summary.json").exists()
    assert (stopped.parent / "curves.png").exists()
    assert weights(stopped.parent / "best.pt")

    assert main(["train", "--resume", "runs/glyphs-kd-001"]) == 0
    assert len(metrics(run)) == epochs[0]
    assert main(["train", "glyphs/kd", *long, "--runs", "other"]) == 0
    never_stopped = workplace / "other" / "glyphs-kd-001"
    assert same_weights(run / "last.pt", never_stopped / "last.pt")
    assert without_time(metrics(run)) == without_time(metrics(never_stopped))


def test_resuming_a_finished_run_shows_its_results(
    workplace: Path, fonts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "glyphs/student", *tiny_student(fonts), "train.epochs=1"]) == 0
    first = metrics(workplace / "runs" / "glyphs-student-001")
    capsys.readouterr()
    assert main(["train", "--resume", "runs/glyphs-student-001"]) == 0
    assert f"{100 * first[0]['val_accuracy']:.2f}" in capsys.readouterr().out
    assert metrics(workplace / "runs" / "glyphs-student-001") == first


def test_a_given_teacher(tiny: list[str], workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "glyphs/kd", *tiny, "train.epochs=1"]) == 0
    (trained,) = (workplace / "runs" / "teachers").glob("*/teacher.pt")
    facts = torch.load(trained, weights_only=True)
    torch.save(facts["model"], workplace / "bare.pt")
    capsys.readouterr()
    for path in (trained, workplace / "bare.pt"):
        assert main(["train", "glyphs/kd", *tiny, "train.epochs=1", f"teacher.checkpoint={path}"]) == 0
        out = capsys.readouterr().out
        assert "teacher epoch" not in out
        assert f"teacher: {facts['val_accuracy']:.2%}" in out
    assert same_weights(Path("runs/glyphs-kd-001/last.pt"), Path("runs/glyphs-kd-003/last.pt"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["train", *arguments]) == 2
    text = capsys.readouterr().err
    assert text.startswith("fastkd: error: ")
    assert "Traceback" not in text
    return text


def test_bad_input_is_refused_before_anything_is_written(
    tiny: list[str], workplace: Path, capsys: pytest.CaptureFixture[str], fonts: Path
) -> None:
    assert "glyphs/kd" in refused(capsys, "glyphs/kdd")
    assert "did you mean train.epochs" in refused(capsys, "glyphs/kd", *tiny, "train.epoch=3")
    assert "'many'" in refused(capsys, "glyphs/kd", *tiny, "train.epochs=many")
    assert "does not exist" in refused(capsys, "glyphs/kd", *tiny, f"data.fonts={workplace / 'none'}")
    empty = workplace / "empty"
    empty.mkdir()
    assert "no readable TTF" in refused(capsys, "glyphs/kd", *tiny, f"data.fonts={empty}")
    assert "train.device" in refused(capsys, "glyphs/kd", *tiny, "train.device=abacus")
    assert "no checkpoint" in refused(capsys, "glyphs/kd", *tiny, "teacher.checkpoint=none.pt")
    assert "the recipe is missing" in refused(capsys)
    assert "the recipe is missing" in refused(capsys, "train.epochs=3")
    assert "not a run folder" in refused(capsys, "--resume", "nowhere")

    classes = 8
    path = workplace / "teacher.pt"
    save_checkpoint(path, {"model": GlyphCNN(classes, width=4).state_dict(), "num_classes": classes})
    text = refused(capsys, "glyphs/kd", *tiny, f"teacher.checkpoint={path}")
    assert f"{path} was trained for 8 classes" in text
    torch.save(GlyphCNN(classes, width=4).state_dict(), path)
    assert "head.weight has shape" in refused(capsys, "glyphs/kd", *tiny, f"teacher.checkpoint={path}")
    path.write_bytes(path.read_bytes()[:-200])
    assert f"{path} is truncated" in refused(capsys, "glyphs/kd", *tiny, f"teacher.checkpoint={path}")
    assert not (workplace / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["glyphs/mhkd", "method.layers=[stages.3]"],
            ["method mhkd: the student has no layer 'stages.3'", "stages.2"],
        ),
        (
            [
                "glyphs/kd",
                "method=fitnets",
                "method.hint_layer=stages.0",
                "method.hint_teacher_layer=head:input",
            ],
            ["two feature maps", "[N, 2, 16, 16]", "the teacher's layer 'head:input' [N, 256]"],
        ),
        (["glyphs/dhkd", "method.feature=stage"], ["the student has no layer 'stage'", "stages"]),
        (["glyphs/kd", "method=fitnets"], ["hint_layer is missing"]),
        (
            ["glyphs/student", "method.hint_weight=1.0", "method.hint_layer=stages.0"],
            ["teacher is None", "a hint or a relation distils"],
        ),
        (["glyphs/student", "student.name=resnet8", "student.width=null"], ["takes images of 3 channels"]),
        (["glyphs/kd", "data.exclude=[Nobody]"], ["data.exclude: no face 'Nobody'"]),
        (["cifar100/kd-resnet32x4-resnet8x4"], ["data.folder is missing"]),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(
    fonts: Path, workplace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    small = [f"data.fonts={fonts}", "data.characters=41-5A"] if arguments[0].startswith("glyphs") else []
    widths = [] if "student.name=resnet8" in arguments or not small else ["student.width=2"]
    widths += ["teacher.width=4"] if small and "student" not in arguments[0] else []
    text = refused(capsys, arguments[0], *small, *widths, *arguments[1:])
    assert all(word in text for word in words), text
    assert not (workplace / "runs").exists()


def test_a_held_out_training_face(
    tiny: list[str], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reported = ["data.holdout=[DejaVu Serif Bold]"]
    choosing = ["data.holdout=[DejaVu Sans Mono Book]", "data.exclude=[DejaVu Serif Bold]"]
    for more in (reported, choosing):
        assert main(["train", "glyphs/kd", *tiny, "train.epochs=1", "teacher.epochs=1", *more]) == 0
        out = capsys.readouterr().out
        assert f"{4 if more is reported else 3} training faces, 1 held out" in out
    # The chosen teacher has not seen the face that is held out for it.
    assert len(list((workplace / "runs" / "teachers").iterdir())) == 2


def test_a_damaged_own_teacher_is_named(
    tiny: list[str], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [*tiny, "train.epochs=1", "teacher.epochs=1"]
    assert main(["train", "glyphs/kd", *short]) == 0
    (path,) = (workplace / "runs" / "teachers").glob("*/teacher.pt")
    path.write_bytes(path.read_bytes()[:3000])
    text = refused(capsys, "glyphs/kd", *short)
    assert str(path.relative_to(workplace)) in text
    assert "delete it" in text


def test_a_loss_that_explodes_is_an_error_with_its_terms(
    workplace: Path, fonts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*tiny_student(fonts), "train.lr=1e30", "train.schedule=constant"]
    text = refused(capsys, "glyphs/student", *arguments)
    assert "not finite in epoch" in text
    assert "runs/glyphs-student-001" in text
    assert "ce " in text


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert {"glyphs/student", "glyphs/kd", "glyphs/dkd", "glyphs/lskd", "glyphs/binary-kl-norm"} <= set(names)
    assert all(len(line.split()) > 3 for line in lines)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(SystemExit) as raised:
        main(["train", "glyphs/kd", "--sedes", "3"])
    assert raised.value.code == 2


def test_importing_the_trainer_is_light() -> None:
    code = (
        "import sys, fastkd.train;"
        "heavy = {'matplotlib', 'torchvision', 'PIL', 'pydantic', 'rich', 'fontTools'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    root = str(Path(__file__).resolve().parents[3])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert done.returncode == 0, done.stderr

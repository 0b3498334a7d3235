"""The command line before and around a training: help, --print, --dry-run, hints, --json, recipes, demo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import pytest

import fastkd
from fastkd import losses
from fastkd.cli import main
from fastkd.distill.method import Method
from fastkd.recipe.files import find_recipe, shipped_recipes
from fastkd.recipe.hints import hint
from fastkd.recipe.keys import every_key, keys_of
from fastkd.recipe.schema import load_recipe
from fastkd.recipe.sections import DATA_SECTIONS
from fastkd.train.commands import demo
from fastkd.train.display.loggers import CSVFile
from tests.train.tiny import STUDENT

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.usefixtures("workplace")


def command(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, "-m", "fastkd", *words], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["recipes"]])
def test_what_needs_no_torch_does_not_import_it(words: list[str]) -> None:
    code = (
        "import sys; from fastkd.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "sys.exit(', '.join({'torch', 'numpy', 'pydantic', 'rich'} & set(sys.modules)) or 0)"
    )
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - began < 3  # 0.2 s on idle cores; torch alone takes longer than this
    assert {"--version": fastkd.__version__, "recipes": "glyphs/kd"}.get(words[0], "usage: ") in done.stdout


def test_ctrl_c_while_a_command_is_imported(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("importlib.import_module", lambda name: signal.raise_signal(signal.SIGINT))
    assert main(["cache-teacher", "glyphs/kd", "--to", "cache"]) == 130
    assert capsys.readouterr().err == "\nstopped\n"


def test_the_lazy_package_has_every_name() -> None:
    assert set(losses.__all__) < set(fastkd.__all__) <= set(dir(fastkd))
    code = (
        "import sys, pickle, fastkd\n"
        "assert 'torch' not in sys.modules\n"
        "assert [getattr(fastkd, name) for name in fastkd.__all__]\n"
        "assert pickle.loads(pickle.dumps(fastkd.kd_loss)) is fastkd.losses.kd_loss\n"
        "assert not hasattr(fastkd, 'kd_los') and fastkd.ops.backend\n"
        "from fastkd import *\n"
        "assert DKDLoss and explain and fit"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_every_key_has_a_type_and_a_meaning() -> None:
    for section in DATA_SECTIONS.values():
        for method in Method._known.values():
            if not method.__module__.startswith("fastkd."):
                continue  # of another test
            for key in (key for keys in keys_of(method, section).values() for key in keys):
                assert key.meaning, key.name
                assert key.kind, key.name


@pytest.mark.parametrize("width", ["50", "80", "140"])
def test_the_keys_of_a_recipe(width: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", width)
    assert main(["train", "glyphs/kd", "train.lr=0.5", "--help"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= int(width)
    for line in (
        "* train.epochs = 6",
        "* train.lr = 0.5",
        "  train.momentum = 0.9",
        "* method.temperature = 4.0",
    ):
        assert line in lines, line
    words = " ".join(out.split())
    assert "passes over the training images (whole number from 1; required)" in words
    assert "(number above 0; default 0.006)" in words
    assert "T, by which both models' logits are divided (number above 0; default 4.0)" in words
    described = {line[2:].partition(" = ")[0] for line in lines if line[:1] in "* " and line[2:3] != " "}
    recipe = load_recipe("glyphs/kd")[1]
    assert set(recipe.flat()) <= described


def test_a_printed_recipe_is_accepted_again(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["glyphs/mhkd", "data.characters=4E00-9FA5", "train.lr=1e-3", "teacher.seed=7"]
    assert main(["train", *words, "--print"]) == 0
    Path("again.yaml").write_text(capsys.readouterr().out)
    assert load_recipe("again.yaml")[1] == load_recipe(words[0], words[1:])[1]
    assert main(["train", *words, "--print", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["train.lr"] == 1e-3
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "override"),
    [
        ("--epochs 3", "train.epochs=3"),
        ("--lr=0.1", "train.lr=0.1"),
        ("--batch-size 64", "train.batch_size=64"),
        ("--seed 3", "train.seed=3"),
        ("--temperature -1", "method.temperature=-1"),
        ("--train.epochs=3", "train.epochs=3"),
        ("--data-root /images", "data.root=/images"),
        ("--learning-rate 1", "train.lr=1"),
        ("--compile train.lr=1", "train.compile=true"),
        ("--epochs", "train.epochs=…"),
    ],
)
def test_an_option_that_is_an_override(words: str, override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "glyphs/kd", *words.split()]) == 2
    option = words.split()[0].partition("=")[0]
    expected = f"fastkd: error: {option} is not an option of fastkd train; use {override}\n"
    assert capsys.readouterr().err == expected


def test_other_unknown_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert hint("--nonsense", ["--nonsense"]) is None
    assert {key.name for key in every_key()} >= {"train.epochs", "data.root", "method.layers"}
    with pytest.raises(SystemExit):
        main(["train", "glyphs/kd", "--sedes", "3"])
    assert "did you mean --seeds" in capsys.readouterr().err


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_compilation_that_cannot_work_is_refused_before_the_teacher_is_trained(
    tiny: list[str], workplace: Path, dry_run: list[str]
) -> None:
    done = command("train", "glyphs/kd", *tiny, "train.compile=true", *dry_run, CXX="/no/such/compiler")
    assert done.returncode == 2, done.stderr
    assert "train.compile: torch.compile does not work on this machine's cpu: " in done.stderr
    assert "/no/such/compiler" in done.stderr
    assert not (workplace / "runs").exists()


def test_a_dry_run_writes_nothing(tiny: list[str], workplace: Path, capsys) -> None:
    assert main(["train", "glyphs/mhkd", *tiny, "--dry-run", "--json"]) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert summary["teacher"]["steps"] == 2 * summary["student"]["steps"] // 3
    assert summary["seconds"] > 0
    for words in (
        "glyph_cnn, width 4,",
        "would be trained first",
        "method: mhkd",
        "of its own",
        "ce ",
        "head_kd",
    ):
        assert words in err, words
    assert "it would create runs/glyphs-mhkd-001; nothing was written there" in err
    assert not list(workplace.iterdir())
    assert main(["train", "glyphs/mhkd", *tiny, "--dry-run", "method.layers=[nowhere]"]) == 2
    assert "no layer 'nowhere'" in capsys.readouterr().err
    off = "method.center_teacher=false"  # which is on by default
    assert main(["train", "glyphs/binary-kl-norm", *tiny, "--dry-run", off]) == 0
    assert "center_teacher false" in capsys.readouterr().out


def test_summaries_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    done = command("train", *STUDENT, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary == {
        **json.loads(Path("runs/fashion-mnist-student-001/summary.json").read_text()),
        **summary,
    }
    assert "student epoch 2/2" in done.stderr
    run = summary["folder"]

    def of(*words: str) -> dict:
        capsys.readouterr()
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert of("train", "--resume", run, "--eval-only")["networks"]["student, best epoch"]["val_rows"] > 0
    assert of("plot", run)["runs"][0]["last"]["val_accuracy"] == summary["last"]["val_accuracy"]
    assert of("export", run, "--weights", "last")["val_accuracy"] == summary["last"]["val_accuracy"]
    assert "eager" in of("doctor")["backends"]["cpu"]
    assert {"glyphs/kd", "glyphs/dkd"} <= {recipe["name"] for recipe in of("recipes")["recipes"]}
    assert of("recipes", "glyphs/kd")["recipe"]["train.epochs"] == 6


def test_a_home_folder_that_the_shell_does_not_expand(
    tiny: list[str],
    workplace: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    run = "~/runs/fashion-mnist-student-001"
    assert main(["train", *STUDENT, "--runs=~/runs"]) == 0
    assert main(["train", f"--resume={run}", "--eval-only"]) == 0
    assert main(["train", f"--resume={run}", "--print"]) == 0
    assert main(["export", run, "--to=~/student.safetensors"]) == 0
    assert main(["plot", run, "--to=~/curves.png"]) == 0
    assert fastkd.load(run).about == fastkd.load("~/student.safetensors").about
    with CSVFile("~/metrics.csv") as watcher:
        watcher.epoch_done({"epoch": 1, "loss": 1.0, "terms": {}, "seconds": {}}, dict)
    for words in (["demo"], ["cache-teacher", "glyphs/kd", *tiny]):
        assert main([*words, "--to=~/runs"]) == 2
        assert f"--to {home / 'runs'}: it already exists" in capsys.readouterr().err
    made = {"curves.png", "metrics.csv", "runs", "student.json", "student.safetensors"}
    assert made <= {path.name for path in home.iterdir()}
    assert not list(workplace.iterdir())


def test_one_recipe_with_its_comments(capsys: pytest.CaptureFixture[str]) -> None:
    name = "imagenet/r18-kd"
    assert main(["recipes", name]) == 0
    assert capsys.readouterr().out == find_recipe(name).text
    assert find_recipe(name).text.startswith("#")
    assert main(["recipes", "imagenet/r18-kdd"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_the_list_has_the_validated_descriptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    for line, name in zip(capsys.readouterr().out.splitlines(), shipped_recipes(), strict=True):
        assert line.split("  ")[-1].strip() == load_recipe(name)[1].description


def test_the_demo(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(demo, "_STUDENT", [*demo._STUDENT, "train.epochs=1"])
    monkeypatch.setattr(demo, "_TEACHER", [*demo._TEACHER, "teacher.epochs=1"])
    assert main(["demo", "--json"]) == 0
    out, err = capsys.readouterr()
    assert set(json.loads(out)["accuracy"]) == {"teacher", "student alone", "student with teacher"}
    assert "seconds; next:" in err
    assert matplotlib.image.imread("fastkd-demo-001/demo.png").std() > 0.05
    mine = workplace / "mine"
    mine.mkdir()
    (mine / "demo.png").write_text("mine")
    assert main(["demo", "--to", "mine"]) == 2
    assert "already exists and is not overwritten" in capsys.readouterr().err
    assert (mine / "demo.png").read_text() == "mine"


def test_one_thing_instead_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", *STUDENT, "--print", "--dry-run"])
    assert ended.value.code == 2
    assert "--dry-run: not allowed with argument --print" in capsys.readouterr().err

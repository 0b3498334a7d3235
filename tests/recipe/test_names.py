"""Names and notes of a run follow the overrides; settings that depend on another setting."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.cli import main
from fastkd.data.glyphs.loader import load_glyph_data
from fastkd.errors import RecipeError
from fastkd.recipe.files import dump_flat_yaml
from fastkd.recipe.schema import load_recipe, without_effect
from fastkd.recipe.sections import DATA_SECTIONS, GlyphsData
from fastkd.train.commands.plot import read_shown
from fastkd.train.distributed import number
from fastkd.train.run.results import student_alone_command

ROOT = Path(__file__).resolve().parents[2]
FASHION = ["data.synthetic=20", "train.epochs=1", "train.device=cpu"]
pytestmark = pytest.mark.usefixtures("workplace")


def test_another_method_is_another_name(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    short = [*tiny, "train.epochs=1", "teacher.epochs=1"]
    assert main(["train", "glyphs/kd", *short, "method=dkd"]) == 0
    out = capsys.readouterr().out
    first = out.splitlines()[0]
    assert first.startswith("glyphs/kd method=dkd: ce_weight CE + T^2 (alpha TCKD + beta NCKD): decoupled")
    assert "glyphs/kd with " in first
    assert "Hinton" not in out
    assert "temperature 4" not in out
    run = Path("runs/glyphs-kd-method-dkd-001")
    assert "│ glyphs/kd method=dkd" in out
    assert json.loads((run / "summary.json").read_text())["name"] == "glyphs/kd method=dkd"
    assert read_shown(run).label == "glyphs/kd method=dkd"
    assert "decoupled distillation" in (run / "recipe.yaml").read_text()
    assert main(["train", "glyphs/kd", *short, "method=dkd", "--resume"]) == 0
    assert "resuming runs/glyphs-kd-method-dkd-001" in capsys.readouterr().out
    assert main(["train", str(run / "recipe.yaml")]) == 0
    assert Path("runs/glyphs-kd-method-dkd-002/recipe.yaml").read_text() == (run / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("overrides", "name", "description"),
    [
        ([], "glyphs/kd", "knowledge distillation (Hinton 2015), 0.1 CE + 0.9 KD at temperature 4"),
        (["train.device=cpu", "train.threads=1"], "glyphs/kd", "… at temperature 4"),
        (["method.temperature=4.0"], "glyphs/kd", "… at temperature 4"),
        (["method.temperature=2.0", "train.epochs=3"], "glyphs/kd",
         "… at temperature 4; with method.temperature=2.0, train.epochs=3"),
        (["method=kd"], "glyphs/kd", "… at temperature 4"),
        (["teacher.name=small_cnn", "teacher.width=3"], "glyphs/kd teacher.name=small_cnn",
         "… at temperature 4; with teacher.name=small_cnn, teacher.width=3"),
        (["method=nkd", "description=mine"], "glyphs/kd method=nkd", "mine"),
        (["train.epochs=3", "data.fonts=/mine", "teacher.checkpoint=/mine/t.pt"], "glyphs/kd",
         "… at temperature 4; with train.epochs=3"),
    ],
)  # fmt: skip
def test_names_and_descriptions(overrides: list[str], name: str, description: str) -> None:
    found, recipe = load_recipe("glyphs/kd", overrides)
    assert found == name
    whole = "knowledge distillation (Hinton 2015), 0.1 CE + 0.9 KD"
    assert recipe.description == description.replace("…", whole)


def test_overrides_of_overrides() -> None:
    Path("run").mkdir()
    _, recipe = load_recipe("glyphs/kd", ["method=dkd"])
    from fastkd.train.run.folder import write_recipe

    write_recipe(Path("run"), "glyphs/kd method=dkd", recipe)
    assert load_recipe("run/recipe.yaml") == ("glyphs/kd method=dkd", recipe)
    assert load_recipe("run/recipe.yaml", ["method=nkd"])[0] == "glyphs/kd method=nkd"


@pytest.mark.parametrize("first", [["train.epochs=2"], ["train.epochs=2", "method=dkd"]])
def test_a_description_says_each_override_once(first: list[str]) -> None:
    Path("recipe.yaml").write_text(dump_flat_yaml(load_recipe("glyphs/kd", first)[1].flat()))
    text = load_recipe("recipe.yaml")[1].description
    assert text.count("train.epochs=2") == 1
    more = load_recipe("recipe.yaml", ["train.epochs=3", "train.lr=0.5"])[1].description
    assert more == text.replace("train.epochs=2", "train.epochs=3") + ", train.lr=0.5"


def test_paths_are_not_described() -> None:
    words = ["data.root=tree", "data.train=/home/me/train", "teacher.checkpoint=t.pt", "data.size=32"]
    description = load_recipe("imagenet/r18-kd", words)[1].description
    assert description.endswith("; with data.size=32")
    words = ["method.teacher_heads=heads.pt", "method.alpha=2.0"]
    assert load_recipe("glyphs/mhkd", words)[1].description.endswith("; with method.alpha=2.0")


def test_the_recipes_own_method_keeps_its_options() -> None:
    plain, named = load_recipe("glyphs/dkd"), load_recipe("glyphs/dkd", ["method=dkd"])
    assert named == plain


def test_a_student_alone_has_no_teacher() -> None:
    for name in ("glyphs/kd", "imagenet/r18-kd"):
        assert load_recipe(name, ["method=cross_entropy"])[1].teacher is None
    hinted = ["method=cross_entropy", "method.hint_weight=1.0", "method.hint_layer=stages.2"]
    assert load_recipe("glyphs/kd", hinted)[1].teacher is not None


def test_no_checkpoint_is_no_reason_to_drop_the_weights() -> None:
    teacher = load_recipe("imagenet/r18-kd", ["teacher.checkpoint=null"])[1].teacher
    assert teacher == load_recipe("imagenet/r18-kd")[1].teacher


def test_a_method_keeps_the_options_given_with_it() -> None:
    for overrides in (["method=dkd", "method.beta=2.0"], ["method.beta=2.0", "method=dkd"]):
        recipe = load_recipe("glyphs/kd", overrides)[1]
        assert (recipe.method, recipe.options["beta"]) == ("dkd", 2.0)


def test_a_width_goes_with_its_network() -> None:
    Path("mine.py").write_text("def net(num_classes):\n    pass\n")
    for name in ("timm/resnet10t", "torchvision/resnet18", "resnet8", "mine:net"):
        recipe = load_recipe("fashion-mnist/kd", [f"student.name={name}", f"teacher.name={name}"])[1]
        assert recipe.student.width is None
        assert recipe.teacher is not None
        assert recipe.teacher.width is None
    assert (
        load_recipe("fashion-mnist/kd", ["student.width=3", "student.name=small_cnn"])[1].student.width == 3
    )
    with pytest.raises(RecipeError, match="student: resnet8 has no width, got 3"):
        load_recipe("glyphs/kd", ["student.width=3", "student.name=resnet8"])
    with pytest.raises(RecipeError, match="student: glyph_cnn needs a width"):
        load_recipe("cifar100/kd-vgg13-vgg8", ["student.name=glyph_cnn"])


@pytest.mark.parametrize("option", ["teacher.epochs=3", "teacher.seed=1", "teacher.checkpoint=x.pt"])
def test_a_teacher_without_a_network(option: str) -> None:
    with pytest.raises(RecipeError, match=rf"{option.partition('=')[0]} is given, but there is no teacher: "):
        load_recipe("glyphs/student", [option])


def test_settings_of_a_training_that_does_not_happen() -> None:
    words = ["teacher.epochs=3", "teacher.batch_size=4", "teacher.lr=0.1", "train.epochs=2"]
    assert without_effect(load_recipe("imagenet/r18-kd", words)[1], words) == [
        "teacher.epochs has no effect: the teacher comes from teacher.weights",
        "teacher.lr has no effect: the teacher comes from teacher.weights",
    ]
    assert without_effect(load_recipe("glyphs/kd", words)[1], words) == []
    assert without_effect(load_recipe("glyphs/student")[1], words) == []
    # A cache is refused if its teacher was trained in another way.
    assert without_effect(load_recipe("glyphs/kd", [*words, "teacher.cache=c"])[1], words) == []


def hint(out: str) -> list[str]:
    (line,) = [line for line in out.splitlines() if "student alone is not known" in line]
    return shlex.split(line.partition("`")[2].partition("`")[0])


@pytest.mark.parametrize("group", ["glyphs", "mine"])
def test_the_hint_leads_to_the_student_alone(
    tiny: list[str], group: str, capsys: pytest.CaptureFixture[str], fonts: Path
) -> None:
    recipe = "glyphs/kd"
    if group == "mine":
        recipe = "mine.yaml"
        Path(recipe).write_text((ROOT / "recipes/glyphs/kd.yaml").read_text())
    more = ["train.epochs=1", "teacher.epochs=1", "train.lr=2e-3", "data.holdout=[DejaVu Serif Bold]"]
    command = ["train", recipe, *tiny, *more, "--runs", "my runs"]
    assert main(command) == 0
    words = hint(capsys.readouterr().out)
    assert words[:2] == ["fastkd", "train"]
    assert words[-2:] == ["--runs", "my runs"]
    assert main(words[1:]) == 0
    capsys.readouterr()
    assert main([*command, "--resume"]) == 0
    out = capsys.readouterr().out
    assert "not known" not in out
    assert "student alone" in out


@pytest.mark.parametrize("group", ["fashion-mnist", "mine"])
def test_a_student_with_a_hint_is_not_alone(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = f"{group}/kd"
    if group == "mine":
        recipe = "mine.yaml"
        Path(recipe).write_text((ROOT / "recipes/fashion-mnist/kd.yaml").read_text())
    small = [*FASHION, "teacher.width=2", "student.width=2", "teacher.epochs=1"]
    hinted = ["method=cross_entropy", "method.hint_weight=1", "method.hint_layer=stages.0"]
    assert main(["train", recipe, *small, *hinted]) == 0
    out = capsys.readouterr().out
    assert "student alone is not known" in out
    assert ("run `fastkd train fashion-mnist/student" in out) == (group == "fashion-mnist")
    assert main(["train", recipe, *small]) == 0
    assert "student alone is not known" in capsys.readouterr().out


@pytest.mark.parametrize("base", ["glyphs/kd", "fashion-mnist/kd"])
@pytest.mark.parametrize("data", DATA_SECTIONS)
def test_the_hint_is_a_command_for_every_kind_of_data(base: str, data: str) -> None:
    given = [f"data.name={data}", "student.name=resnet8", "train.lr=2e-3"]
    name, recipe = load_recipe(base, given)
    command = student_alone_command(name, recipe, Path("runs/x"), Path("runs"))
    assert command is not None
    words = shlex.split(command)
    _, alone = load_recipe(words[2], words[3:])
    assert alone.method == "cross_entropy"
    assert (alone.data, alone.student, alone.train) == (recipe.data, recipe.student, recipe.train)


def test_validation_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    from fastkd.data.arrays import ArrayData

    original = ArrayData.val_loader

    def val_loader(self: Any, device: torch.device, batch_size: int = 512) -> Any:
        sizes.append(batch_size)
        return original(self, device, batch_size)

    monkeypatch.setattr(ArrayData, "val_loader", val_loader)
    for more, wanted in (([], {5}), (["train.val_batch_size=7"], {7})):
        sizes.clear()
        assert main(["train", "fashion-mnist/student", *FASHION, "train.batch_size=5", *more]) == 0
        assert {size for size in sizes if size != 2} == wanted  # examples are two images
    first, second = (
        json.loads(p.read_text())["comparison"] for p in sorted(Path("runs").glob("*/summary.json"))
    )
    assert first == second


@pytest.mark.parametrize(("text", "value"), [("", 1), (" ", 1), ("1", 1), ("4", 4)])
def test_numbers_of_the_environment(text: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", text)
    assert number("WORLD_SIZE", 1) == value


@pytest.mark.parametrize("command", ["train", "cache-teacher"])
def test_a_launcher_that_leaves_nonsense(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--to", "cache"] if command == "cache-teacher" else []
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert main([command, "fashion-mnist/kd", *FASHION, *more]) == 2
    assert "the environment's WORLD_SIZE is 'two'; expected an integer" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "")
    if command == "train":
        assert main([command, "fashion-mnist/kd", *FASHION]) == 2
        assert "RANK" in capsys.readouterr().err


def test_an_empty_world_size_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "")
    assert main(["train", "fashion-mnist/student", *FASHION]) == 0


def test_a_holdout_that_nobody_set() -> None:
    # DejaVu's holdout faces that are left out must not be required.
    few = {"characters": "41-5A,2B0-2FF,1D00-1DBF", "coverage": 0.9}
    for options in (few, {"characters": "41-5A", "exclude": ["DejaVu Serif Italic"]}):
        data = load_glyph_data(GlyphsData(**options))
        assert data.val_faces
        assert data.train_faces


def test_a_notebooks_backend_ends_no_run(tiny: list[str]) -> None:
    command = [sys.executable, "-m", "fastkd", "train", "glyphs/kd", *tiny]
    for backend in ("module://matplotlib_inline.backend_inline", "nonsense"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": backend}
        done = subprocess.run(
            [*command, "train.epochs=1", "teacher.epochs=1", "--runs", backend[:6]],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert (Path(backend[:6]) / "glyphs-kd-001" / "curves.png").stat().st_size > 5000

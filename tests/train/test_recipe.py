from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from fastkd.train.errors import RecipeError
from fastkd.train.recipe import Distill, load_recipe
from fastkd.train.recipe_files import dump_flat_yaml, parse_flat_yaml, shipped_recipes

NAMES = ("binary-kl-norm", "dkd", "kd", "lskd", "student")


def test_every_recipe_of_the_glyphs_ships_and_is_valid() -> None:
    assert {f"glyphs/{name}" for name in NAMES} <= set(shipped_recipes())
    for name in shipped_recipes():
        found, recipe = load_recipe(name)
        assert found == name
        assert recipe.description


def test_values_are_read_as_written() -> None:
    _, recipe = load_recipe("glyphs/kd")
    assert isinstance(recipe.loss, Distill)
    assert (recipe.loss.ce_weight, recipe.loss.kd_weight, recipe.loss.temperature) == (0.1, 0.9, 4.0)
    assert recipe.train.lr == 0.006  # written 6e-3, which plain YAML 1.1 would read as a string
    assert recipe.teacher is not None
    assert (recipe.teacher.width, recipe.student.width) == (24, 6)


@pytest.mark.parametrize("name", NAMES)
def test_the_resolved_recipe_means_the_same(name: str, tmp_path: Path) -> None:
    _, recipe = load_recipe(f"glyphs/{name}", ["data.characters=4E00-9FA5", "train.lr=1e-3"])
    path = tmp_path / "again.yaml"
    path.write_text(dump_flat_yaml(recipe.flat()))
    assert load_recipe(str(path)) == ("again", recipe)


def test_a_recipe_is_frozen() -> None:
    _, recipe = load_recipe("glyphs/kd")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.epochs = 3


def test_another_loss_on_the_command_line_drops_the_old_options() -> None:
    _, recipe = load_recipe("glyphs/kd", ["loss.name=binary_kl", "loss.weight=0.5"])
    assert recipe.loss.model_dump() == {
        "name": "binary_kl",
        "ce_weight": 0.1,
        "weight": 0.5,
        "temperature": 4.0,
    }


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, recipe = load_recipe("glyphs/kd", ["data.fonts=some/fonts", "teacher.checkpoint=t.pt"])
    assert recipe.data.fonts == str(tmp_path / "some/fonts")
    assert recipe.teacher is not None
    assert recipe.teacher.checkpoint == str(tmp_path / "t.pt")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.epoch=3", ["unknown key 'train.epoch'", "did you mean train.epochs"]),
        ("epochs=3", ["unknown key 'epochs'", "train.epochs"]),
        ("loss.kd_wieght=1.0", ["loss.kd_wieght", "did you mean loss.kd_weight"]),
        ("loss.weight=1.0", ["unknown key 'loss.weight'"]),
        ("train.epochs=six", ["train.epochs", "'six'", "integer"]),
        ("train.epochs=2.5", ["train.epochs", "2.5", "integer"]),
        ("train.epochs=true", ["train.epochs", "True", "integer"]),
        ("train.epochs=0", ["train.epochs", "0", "greater than or equal to 1"]),
        ("train.lr='0.1'", ["train.lr", "'0.1'", "number"]),
        ("loss.temperature=0", ["loss.temperature = 0", "greater than 0"]),
        ("loss.temperature=-1", ["loss.temperature = -1", "greater than 0"]),
        ("loss.kd_weight=.inf", ["loss.kd_weight", "finite"]),
        ("loss.kd_weight=0", ["kd_weight, tckd_weight, nckd_weight"]),
        ("loss.standardize=1", ["loss.standardize", "1", "boolean"]),
        ("train.schedule=step", ["train.schedule", "'step'", "'one_cycle'"]),
        ("loss.name=distil", ["loss.name", "'distil'", "did you mean distill", "binary_kl_norm"]),
        ("data.holdout=Sans", ["data.holdout", "'Sans'", "list"]),
        ("train.epochs", ["'train.epochs'", "key=value"]),
        ("train.lr=[1", ["train.lr", "not valid YAML"]),
        ("train={epochs: 3}", ["train: recipes are flat", "train.epochs"]),
    ],
)
def test_a_bad_override_is_refused_by_name(override: str, parts: list[str]) -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe("glyphs/kd", [override])
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("description: a\ndescription: b\n", "'description' is given twice"),
        ("- a\n- b\n", "expected lines of `key: value`, found list"),
        ("a: [\n", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("", "found NoneType"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, part: str) -> None:
    with pytest.raises(RecipeError, match=r"here\.yaml") as raised:
        parse_flat_yaml(text, "here.yaml")
    assert part in str(raised.value)


def test_missing_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("description: x\nloss.name: distill\nstudent.width: 2\ntrain.epochs: 1\n")
    with pytest.raises(RecipeError, match=r"loss\.ce_weight is missing"):
        load_recipe(str(path))
    path.write_text("description: x\nloss.name: binary_kl\nstudent.width: 2\ntrain.epochs: 1\n")
    with pytest.raises(RecipeError, match="needs a teacher"):
        load_recipe(str(path))


def test_an_unknown_recipe_gets_the_nearest_names() -> None:
    with pytest.raises(RecipeError, match=r"did you mean .*glyphs/dkd"):
        load_recipe("glyphs/dkdd")
    with pytest.raises(RecipeError, match="did you mean glyphs/lskd"):
        load_recipe("lskd")
    with pytest.raises(RecipeError, match=r"no recipe file nowhere\.yaml"):
        load_recipe("nowhere.yaml")

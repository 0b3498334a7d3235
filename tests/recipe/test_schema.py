from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from fastkd.errors import RecipeError
from fastkd.recipe.files import dump_flat_yaml, parse_flat_yaml, shipped_recipes
from fastkd.recipe.schema import load_recipe

NAMES = ("binary-kl-norm", "dckd", "dhkd", "dkd", "kd", "lskd", "mhkd", "student")


def test_every_recipe_of_the_glyphs_ships_and_is_valid() -> None:
    assert {f"glyphs/{name}" for name in NAMES} <= set(shipped_recipes())
    for name in shipped_recipes():
        found, recipe = load_recipe(name)
        assert found == name
        assert recipe.description


def test_values_are_read_as_written() -> None:
    _, recipe = load_recipe("glyphs/kd")
    assert recipe.method == "kd"
    assert [recipe.options[name] for name in ("ce_weight", "kd_weight", "temperature")] == [0.1, 0.9, 4.0]
    assert recipe.options["warmup_epochs"] == 0  # a default of the method's signature
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


def test_another_method_on_the_command_line_has_its_own_defaults() -> None:
    _, recipe = load_recipe("glyphs/kd", ["method=binary_kl", "method.weight=0.5"])
    assert recipe.method == "binary_kl"
    given = {name: recipe.options[name] for name in ("ce_weight", "weight", "temperature")}
    assert given == {"ce_weight": 1.0, "weight": 0.5, "temperature": 2.0}


def test_the_teacher_is_trained_as_the_student_where_nothing_else_is_said() -> None:
    _, recipe = load_recipe("glyphs/kd", ["train.lr=1e-3", "train.seed=7", "teacher.batch_size=64"])
    assert recipe.teacher is not None
    assert (recipe.teacher.lr, recipe.teacher.batch_size) == (1e-3, 64)
    assert (recipe.teacher.epochs, recipe.teacher.seed) == (12, 0)


def test_a_method_of_ones_own_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_methods.py").write_text(
        "from fastkd.distill import KD, Weight\n"
        "class Mine(KD):\n"
        "    def __init__(\n"
        "        self, student, teacher, *, extra: Weight = 3.0, cap: Weight | None = 1.0, **shared\n"
        "    ):\n"
        "        super().__init__(student, teacher, **shared)\n"
    )
    monkeypatch.chdir(tmp_path)
    _, recipe = load_recipe("glyphs/kd", ["method=my_methods:Mine", "method.temperature=2"])
    assert (recipe.options["extra"], recipe.options["temperature"]) == (3.0, 2)
    assert str(tmp_path) not in sys.path
    with pytest.raises(RecipeError, match=r"did you mean method\.extra"):
        load_recipe("glyphs/kd", ["method=my_methods:Mine", "method.exrta=2"])
    # None where the default is not: written out, else a run would be resumed with the default.
    _, uncapped = load_recipe("glyphs/kd", ["method=my_methods:Mine", "method.cap=null"])
    Path("run.yaml").write_text(dump_flat_yaml(uncapped.flat()))
    assert load_recipe("run.yaml")[1].options["cap"] is None


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, recipe = load_recipe(
        "glyphs/mhkd", ["data.fonts=some/fonts", "teacher.checkpoint=t.pt", "method.teacher_heads=h.pt"]
    )
    assert recipe.data.fonts == str(tmp_path / "some/fonts")
    assert recipe.teacher is not None
    assert recipe.teacher.checkpoint == str(tmp_path / "t.pt")
    assert recipe.options["teacher_heads"] == str(tmp_path / "h.pt")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.epoch=3", ["unknown key 'train.epoch'", "did you mean train.epochs"]),
        ("epochs=3", ["unknown key 'epochs'", "train.epochs"]),
        ("method.kd_wieght=1.0", ["method.kd_wieght", "did you mean method.kd_weight"]),
        ("method.weight=1.0", ["unknown key 'method.weight'"]),
        ("loss.kd_weight=1.0", ["unknown key 'loss.kd_weight'", "method.kd_weight"]),
        ("train.epochs=six", ["train.epochs", "'six'", "integer"]),
        ("train.epochs=2.5", ["train.epochs", "2.5", "integer"]),
        ("train.epochs=true", ["train.epochs", "True", "integer"]),
        ("train.epochs=0", ["train.epochs", "0", "greater than or equal to 1"]),
        ("train.lr='0.1'", ["train.lr", "'0.1'", "number"]),
        ("method.temperature=0", ["method.temperature = 0", "greater than 0"]),
        ("method.temperature=-1", ["method.temperature = -1", "greater than 0"]),
        ("method.kd_weight=.inf", ["method.kd_weight", "inf"]),
        ("method.standardize=1", ["method.standardize", "1", "boolean"]),
        ("train.schedule=stairs", ["train.schedule", "'stairs'", "'one_cycle'"]),
        ("method=dhk", ["unknown method 'dhk'", "dhkd", "binary_kl_norm"]),
        ("method=3", ["method = 3"]),
        ("method={name: kd}", ["method: recipes are flat", "method.alpha"]),
        ("data.name=cifar10", ["data.name = 'cifar10'", "did you mean cifar100"]),
        ("student.name=glyph_cn", ["student: unknown model 'glyph_cn'", "did you mean glyph_cnn"]),
        ("teacher.name=null", ["there is no teacher: teacher.name"]),
        ("student.width=null", ["student: glyph_cnn needs a width"]),
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
    path.write_text("description: x\nmethod: mhkd\nstudent.width: 2\ntrain.epochs: 1\n")
    with pytest.raises(RecipeError, match=r"method\.layers is missing"):
        load_recipe(str(path))
    path.write_text("description: x\nmethod: binary_kl\nstudent.width: 2\ntrain.epochs: 1\n")
    with pytest.raises(RecipeError, match="needs a teacher"):
        load_recipe(str(path))
    path.write_text("description: x\nstudent.width: 2\ntrain.epochs: 1\n")
    with pytest.raises(RecipeError, match="method is missing"):
        load_recipe(str(path))


def test_an_unknown_recipe_gets_the_nearest_names() -> None:
    with pytest.raises(RecipeError, match=r"did you mean .*glyphs/dkd"):
        load_recipe("glyphs/dkdd")
    with pytest.raises(RecipeError, match=r"did you mean .*glyphs/lskd"):
        load_recipe("lskd")
    with pytest.raises(RecipeError, match=r"no recipe file nowhere\.yaml"):
        load_recipe("nowhere.yaml")

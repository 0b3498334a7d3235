"""Recipes at the limits of what is accepted, and where what is refused is said to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_type_hints

import pytest

from fastkd.errors import RecipeError
from fastkd.recipe import files, sections
from fastkd.recipe.hints import hint
from fastkd.recipe.keys import kind_of
from fastkd.recipe.schema import load_recipe


@pytest.mark.parametrize("text", ["a: &x 1\nb: *x\n", "a: &x 1\n", "a: *x\n"])
def test_anchors_and_aliases_are_refused(text: str) -> None:
    """Ten lines of them can expand to more than memory holds."""
    with pytest.raises(RecipeError, match=r"anchors and aliases .* \(line \d, column 4\)"):
        files.parse_flat_yaml(text, "mine.yaml")


def test_a_file_that_is_too_long_is_not_parsed() -> None:
    assert files.parse_flat_yaml("a: 1 #".ljust(1_000_000, "x"), "mine.yaml") == {"a": 1}
    with pytest.raises(RecipeError, match="1,000,001 characters; expected at most 1,000,000"):
        files.parse_flat_yaml("a: 1 #".ljust(1_000_001, "x"), "mine.yaml")


def test_both_endings_of_yaml(workplace: Path) -> None:
    Path("mine.yml").write_text("a: 1")
    assert files.find_recipe("mine.yml").name == "mine"
    with pytest.raises(RecipeError, match=r"no recipe file other\.yml"):
        files.find_recipe("other.yml")


@pytest.mark.parametrize(("name", "read"), [("glyphs/kd", "glyphs/kd"), ("a\nb", "recipe"), (3, "recipe")])
def test_the_name_that_a_run_folder_gives(name: object, read: str, workplace: Path) -> None:
    Path("recipe.yaml").write_text("a: 1")
    Path("run.json").write_text(json.dumps({"name": name}))
    assert files.find_recipe("recipe.yaml").name == read


def test_recipes_beside_an_installed_package_are_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_package(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(files.importlib.resources, "files", no_package)
    monkeypatch.setattr(files, "__file__", str(tmp_path / "fastkd" / "recipe" / "files.py"))
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "theirs.yaml").write_text("a: 1")
    assert files.shipped_recipes() == {}
    (tmp_path / "csrc").mkdir()
    assert list(files.shipped_recipes()) == ["theirs"]


def test_where_a_value_is_wrong() -> None:
    """By its key in the recipe, and with as much of the value as a line has room for."""
    with pytest.raises(RecipeError) as refused:
        load_recipe("fashion-mnist/kd", [f"data.holdout={'x' * 200}", "train.accumulate=no"])
    lines = str(refused.value).splitlines()
    assert f"data.holdout = '{'x' * 96}... (str): input should be a valid integer" in lines[0]
    assert "train.accumulate = 'no' (str): " in lines[1]


def test_teachers(workplace: Path) -> None:
    _, recipe = load_recipe("fashion-mnist/kd", ["teacher.cache=logits", "teacher.checkpoint=a.pt"])
    assert recipe.teacher is not None
    assert recipe.teacher.cache == str(workplace / "logits")
    assert recipe.teacher.checkpoint == str(workplace / "a.pt")
    both = ["teacher.checkpoint=a.pt", "teacher.weights=IMAGENET1K_V1", "teacher.name=torchvision/resnet18"]
    with pytest.raises(RecipeError, match=r"either teacher\.checkpoint or teacher\.weights, not both"):
        load_recipe("fashion-mnist/kd", both)


def test_one_image_per_part_of_a_batch() -> None:
    _, recipe = load_recipe("fashion-mnist/kd", ["train.batch_size=4", "train.accumulate=4"])
    assert recipe.train.accumulate == 4
    with pytest.raises(RecipeError, match="accumulate = 5 is more than batch_size = 4"):
        load_recipe("fashion-mnist/kd", ["train.batch_size=4", "train.accumulate=5"])


@pytest.mark.parametrize(
    ("words", "override"),
    [
        (["--lr", "0.1"], "train.lr=0.1"),
        (["--lr=0.1"], "train.lr=0.1"),
        (["--lr", "--dry-run"], "train.lr=…"),
        (["--lr", "train.epochs=3"], "train.lr=…"),
        (["--lr"], "train.lr=…"),
        (["--compile", "false"], "train.compile=false"),
        (["--compile", "glyphs/kd"], "train.compile=true"),
    ],
)
def test_the_value_of_an_option_that_is_an_override(words: list[str], override: str) -> None:
    assert hint(words[0], ["train", *words]) == override


@pytest.mark.parametrize(
    ("annotation", "kind"),
    [
        (sections.Positive, "number above 0"),
        (sections.Weight, "number from 0"),
        (sections.Fraction, "number from 0 to 1"),
        (sections.Count | None, "whole number from 1, or null"),
        (get_type_hints(sections.Train, include_extras=True)["ema"], "number above 0 and below 1, or null"),
    ],
)
def test_kinds_in_words(annotation: object, kind: str) -> None:
    assert kind_of(annotation) == kind

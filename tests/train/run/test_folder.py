"""Run folders: their numbers; which runs are compared; which settings of a recipe reach the loop."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from fastkd.data.data import load_data
from fastkd.errors import RecipeError
from fastkd.recipe.schema import load_recipe
from fastkd.recipe.sections import Optimization, Train
from fastkd.train.loop import fit_method
from fastkd.train.run import fitting
from fastkd.train.run.folder import create_run_folder, folders_of, write_json
from fastkd.train.run.run import comparison_key
from fastkd.train.run.seeds import seed_count


def test_numbers_of_run_folders(tmp_path: Path) -> None:
    runs = tmp_path / "of" / "runs"
    made = [create_run_folder(runs, "glyphs/kd method=dkd") for _ in range(3)]
    assert [folder.name for folder in made] == [f"glyphs-kd-method-dkd-{number:03d}" for number in (1, 2, 3)]
    made[0].rmdir()
    (runs / "glyphs-kd-method-dkd-copy-007").mkdir()
    assert create_run_folder(runs, "glyphs/kd method=dkd").name.endswith("-dkd-004")
    # A name is no pattern.
    (runs / "axb-005").mkdir()
    assert create_run_folder(runs, "a.b").name == "a.b-001"
    assert folders_of(runs, "a.b") == {1: runs / "a.b-001"}


@pytest.mark.parametrize("count", [0, -1, True, 2.0, "2", None])
def test_a_damaged_group_of_seeds(count: object, tmp_path: Path) -> None:
    write_json(tmp_path / "seeds.json", {"count": 3})
    assert seed_count(tmp_path) == 3
    write_json(tmp_path / "seeds.json", {"count": count})
    with pytest.raises(RecipeError, match=r"seeds\.json is damaged: count = .*, expected a number of seeds"):
        seed_count(tmp_path)


@pytest.mark.parametrize(
    ("override", "compared"),
    [
        ("train.seed=1", True),
        ("train.device=cpu", True),
        ("train.threads=1", True),
        ("train.val_batch_size=7", True),
        ("train.log_every=7", True),
        ("train.accumulate=1", True),
        ("train.accumulate=2", False),
        ("train.epochs=7", False),
        ("train.lr=0.5", False),
        ("train.clip_norm=1.0", False),
        ("train.ema=0.9", False),
        ("train.precision=bfloat16", False),
        ("student.width=3", False),
        ("data.augment=false", False),
    ],
)
def test_which_runs_are_compared(override: str, compared: bool) -> None:
    """Those that differ in what their results do not depend on, or in the method."""

    def key(*overrides: str) -> str:
        _, recipe = load_recipe("fashion-mnist/kd", ["data.synthetic=4", *overrides])
        return comparison_key(recipe, load_data(recipe.data))

    assert key("method=dkd") == key("teacher.epochs=9") == key()
    assert (key(override) == key()) == compared


def test_every_setting_that_the_loop_knows_reaches_it() -> None:
    """Those of ``Optimization`` are in the optimizer and its schedule, and in the call itself."""
    settings = Train.model_fields.keys() - Optimization.model_fields.keys()
    known = inspect.signature(fit_method).parameters.keys() & settings
    assert {*fitting._OF_THE_LOOP, "device"} == known

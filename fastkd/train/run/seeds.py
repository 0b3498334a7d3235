"""One recipe over several seeds: a folder of runs that is resumed as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from fastkd.errors import RecipeError
from fastkd.files.atomic import make_folder
from fastkd.recipe.sections import Recipe

from .folder import GROUP, create_run_folder, is_summary, read_json, write_json, write_recipe
from .run import run_recipe, stopped
from .teacher_cache import CacheError, TeacherCache


def run_seeds(
    name: str, recipe: Recipe, count: int, *, runs: Path, console: Console, folder: Path | None = None
) -> tuple[Path, list[dict[str, Any]]]:
    """Run the seeds ``train.seed`` … ``train.seed + count - 1``, except those that ``folder`` has finished.

    Returns the group's folder and the summaries. Raises what ``run_recipe`` raises, with the group as the
    folder to resume. A new group has no folder until its first seed is known to be usable.
    """
    check_cache_of_seeds(recipe, count)
    summaries: list[dict[str, Any]] = []
    for seed in range(recipe.train.seed, recipe.train.seed + count):

        def create(seed: int = seed) -> Path:
            nonlocal folder
            if folder is None:
                folder = create_run_folder(runs, name)
                write_recipe(folder, name, recipe)
                write_json(folder / GROUP, {"count": count})
            run = folder / f"seed-{seed}"
            make_folder(run)
            return run

        run = None if folder is None else create()
        summary: dict[str, Any] = {} if run is None else read_json(run / "summary.json")
        if not is_summary(summary):
            seeded = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed})})
            try:
                summary = run_recipe(
                    name,
                    seeded,
                    runs=runs,
                    console=console,
                    folder=run,
                    create=create,
                    resumed_by=lambda run: run.parent,  # the other seeds are to be run too
                )
            except KeyboardInterrupt:
                raise stopped(folder) from None
        summaries.append(summary)
    assert folder is not None
    if len({summary["comparison"] for summary in summaries}) > 1:
        epochs = ", ".join(f"seed {one['seed']}: {one['last']['epoch']}" for one in summaries)
        note = f"the seeds of {folder} had different settings (epochs: {epochs}), and so has their mean"
        console.print(note, soft_wrap=True)
    return folder, summaries


def check_cache_of_seeds(recipe: Recipe, count: int) -> None:
    """Raise ``CacheError`` if the recipe's cache has images that were drawn with one seed."""
    if count > 1 and recipe.teacher is not None and recipe.teacher.cache is not None:
        cache = TeacherCache(Path(recipe.teacher.cache))
        seed = cache.facts.get("seed")
        if seed is not None:
            raise CacheError(
                f"--seeds {count}: teacher.cache = {cache.folder} has the images of train.seed={seed} alone; "
                "create a cache for each seed and start each on its own with train.seed=…"
            )


def seed_count(folder: Path) -> int:
    """The number of seeds of a group. Raises ``RecipeError`` if its file is damaged."""
    content = read_json(folder / GROUP)
    count = content.get("count") if isinstance(content, dict) else None
    if type(count) is not int or count < 1:
        raise RecipeError(f"{folder / GROUP} is damaged: count = {count!r}, expected a number of seeds")
    return count

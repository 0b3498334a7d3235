"""The student of a run, rebuilt from its folder: the network with its weights, and what is known about it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastkd.data.data import load_data
from fastkd.errors import CheckpointError, DataError
from fastkd.files.sealed import short_digest_of
from fastkd.messages import kind_and_text
from fastkd.models import build_model
from fastkd.recipe.schema import load_recipe
from fastkd.recipe.sections import Recipe
from fastkd.train.evaluation import ACCURACIES
from fastkd.train.state_dicts import fill
from fastkd.version import __version__

from .about import About, Network, make_about, without_paths
from .checkpoint import load_checkpoint
from .folder import is_seed_group, read_json
from .weights import as_validated, state_dict_in


def read_student(
    folder: Path, which: str = "best", network: nn.Module | None = None
) -> tuple[nn.Module, About]:
    """The student of the best or the last epoch, in eval mode, without a method's heads.

    ``network``: into which the weights are loaded, in place of the one that the recipe names. Raises
    ``TrainError``.
    """
    if is_seed_group(folder):
        raise CheckpointError(f"{folder} is a group of seeds; name one of its runs: {folder}/seed-…")
    if not (folder / "recipe.yaml").is_file():
        raise CheckpointError(f"{folder} is not a run folder (it has no recipe.yaml)")
    name, recipe = load_recipe(str(folder / "recipe.yaml"))
    best = folder / "best.pt"
    remedy = "a run writes it after its first epoch"
    facts = load_checkpoint(best, remedy=remedy)
    content = facts if which == "best" else load_checkpoint(folder / f"{which}.pt", remedy=remedy)
    run = read_json(folder / "run.json")
    about = make_about(
        best,
        fastkd=__version__,
        network=_network_of(facts, recipe, best),
        **_data_of(facts, recipe, best),
        run={
            "name": str(run["name"]) if isinstance(run, dict) and "name" in run else name,
            "weights": which,
            **_measured(content),
            "recipe": without_paths(recipe),
        },
    )
    model = rebuilt(about.network, folder, network)
    weights = state_dict_in(as_validated(content), model)
    if weights is None:
        raise CheckpointError(f"{folder / which}.pt holds no state dict of tensors")
    fill(model, weights, f"{folder / which}.pt", "the recipe and the weights of a run must match")
    return model.eval(), about


def rebuilt(facts: Network, origin: Path, network: nn.Module | None) -> nn.Module:
    """The untrained network, or ``network``. Raises ``CheckpointError``."""
    if network is not None:
        if not isinstance(network, nn.Module):
            raise TypeError(f"network is a {type(network).__name__}; expected a torch.nn.Module")
        return network
    try:
        return build_model(**facts.model_dump())
    except Exception as error:  # the module of a network of the user's own can raise anything
        reason = str(error) if isinstance(error, ValueError) else kind_and_text(error)
        raise CheckpointError(
            f"{origin}: the network cannot be rebuilt: {reason}; build it and pass it as "
            "fastkd.load(…, network=…)"
        ) from None


def _network_of(facts: Mapping[str, Any], recipe: Recipe, best: Path) -> dict[str, Any]:
    shape, student = facts.get("input"), recipe.student
    if not (
        isinstance(shape, list)
        and len(shape) == 3
        and all(isinstance(size, int) and size > 0 for size in (*shape, facts.get("num_classes")))
    ):
        raise CheckpointError(f"{best} lacks a valid input shape or number of classes")
    return {
        "name": student.name,
        "num_classes": facts["num_classes"],
        "width": student.width,
        "channels": shape[0],
        "size": shape[-1],
    }


def _data_of(facts: Mapping[str, Any], recipe: Recipe, best: Path) -> dict[str, Any]:
    """Classes and transform as the checkpoint has them, or, if an older version wrote it, of the data."""
    if "transform" in facts:
        return {"classes": facts.get("classes"), "transform": facts["transform"]}
    older = f"{best} lacks the transform of its images: an older version of fastkd wrote it"
    try:
        data = load_data(recipe.data)
    except DataError as error:
        raise CheckpointError(f"{older}, and its data cannot be read: {error}") from None
    if short_digest_of(data.fingerprint) != facts.get("data"):
        raise CheckpointError(f"{older}, and its data have changed: {data.describe()}")
    names = data.class_names
    return {"classes": None if names is None else list(names), "transform": data.transform.model_dump()}


def _measured(content: Mapping[str, Any]) -> dict[str, Any]:
    """Epoch and accuracies of the weights; None within an epoch, which is not validated."""
    record = content
    if "history" in content:
        history = content["history"]
        record = history[-1] if history and not content.get("position") else {}
    return {key: record.get(key) for key in ("epoch", *ACCURACIES)}

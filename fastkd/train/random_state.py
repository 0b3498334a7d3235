"""Saving and restoring the state of random generators as plain values."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy
import torch


def seed_generators(seed: int, rank: int = 0) -> None:
    """Seed the generators of ``get_random_state``; each rank draws different numbers."""
    torch.manual_seed(seed + 2**32 * rank)
    numpy.random.seed([seed, rank])
    random.seed(f"{seed} {rank}")


def own_generators(loader: Any) -> list[torch.Generator]:
    """The generators that a ``DataLoader`` and its samplers draw from instead of torch's global one."""
    batches = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def get_random_state(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """State of torch (CPU and every CUDA device), NumPy's global generator, ``random`` and ``generators``.

    Only tensors and plain values, so that ``torch.load(weights_only=True)`` reads it back.
    """
    name, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
        "own": [generator.get_state() for generator in generators],
    }


def set_random_state(state: dict[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Restore a state of ``get_random_state``; of CUDA and ``generators`` only if there are as many."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([generator.cpu() for generator in state["cuda"]])
    name, keys, position, has_gauss, gauss = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    own = state.get("own", [])  # states of older versions have none
    if len(own) == len(generators):
        for generator, saved in zip(generators, own, strict=True):
            generator.set_state(saved.cpu())

"""How far a cache is from its teacher: the recipe's loss and gradient on the first batches."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd.data.data import Data
from fastkd.distill import Method
from fastkd.distill.taps import eval_mode, named_logits
from fastkd.distill.terms import total_of
from fastkd.recipe.sections import Recipe
from fastkd.train.precision import Numerics, autocast, place
from fastkd.train.trial import Sizes, unchanged

from .build import build_method, build_network
from .cache_stores import Store, TopKStore
from .teacher_cache import CachedLoader, TeacherCache

BATCHES = 4


class Difference(NamedTuple):
    """Of a loss and its gradient from the teacher's, the largest over the batches."""

    loss: float  # relative
    gradient: float  # norm of the difference by the norm
    cosine: float  # of the two gradients, the smallest


def measure_agreement(
    cache: TeacherCache, store: Store, recipe: Recipe, data: Data, teacher: nn.Module, device: torch.device
) -> dict[str, Any]:
    """For report.json. The student is untrained; ``store`` is the one that the cache was made with.

    The gradient is by the student's logits; for methods with heads of their own, which the teacher may reach
    the student through, by all trained parameters.

    For top-k the difference is the definition's: the other classes are one. "rounding" is the part of it that
    float16 causes: the difference from the same classes unrounded.

    Batches that training would leave out are left out.
    """
    torch.manual_seed(recipe.train.seed)
    student = build_network(recipe.student, data).to(device)
    live = build_method(recipe, student, teacher, data, device)
    cached = build_method(recipe, student, cache.teacher(), data, device)
    cached.load_parts_state(live.parts_state())
    for method in (live, cached):
        place(method, Numerics(device, recipe.train.precision), recipe.train.teacher_precision)
    loader: Any = CachedLoader(data.train_loader(recipe.train.batch_size, recipe.train.seed, device), cache)
    sizes = Sizes(live, recipe.train.precision, 1, lambda _: None)
    differences, rounding = [], []
    for batch in itertools.islice((batch for batch in loader if sizes.take(batch[:2])), BATCHES):
        images, target, *_ = batch
        ours = _loss_and_gradient(cached, batch, recipe)
        differences.append(_difference(ours, _loss_and_gradient(live, (images, target), recipe)))
        if isinstance(store, TopKStore):
            outputs = teacher_outputs(store, teacher, images, target, recipe)
            unrounded = _loss_and_gradient(cached, (images, target, *outputs), recipe)
            rounding.append(_difference(ours, unrounded))
    report: dict[str, Any] = {
        "batches": len(differences),
        "gradient_by": "parameters" if _has_heads(live) else "student logits",
        **_worst(differences)._asdict(),
    }
    return {**report, "rounding": _worst(rounding)._asdict()} if rounding else report


@torch.no_grad()
def teacher_outputs(
    store: Store, teacher: nn.Module, images: Tensor, target: Tensor, recipe: Recipe
) -> tuple[Tensor, ...]:
    """What a store keeps of a batch, with the teacher in the precision that training would use."""
    precision = recipe.train.teacher_precision or recipe.train.precision
    with autocast(images.device, precision), eval_mode(teacher):
        return store.of_teacher(teacher, images, target)


def _has_heads(method: Method) -> bool:
    return any(not name.startswith("student.") for name, _ in method.named_parameters())


def _loss_and_gradient(method: Method, batch: tuple[Tensor, ...], recipe: Recipe) -> tuple[Tensor, Tensor]:
    """In train mode, without side effects: with the same random numbers at every call."""
    logits: list[Tensor] = []
    with unchanged(method, method.teacher):
        method.train()
        hook = method.student.register_forward_hook(lambda _, __, out: logits.append(named_logits(out)))
        try:
            with autocast(batch[0].device, recipe.train.precision):
                loss = total_of(method(batch))
        finally:
            hook.remove()
        trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        by = trained if _has_heads(method) else logits
        gradients = torch.autograd.grad(loss, by, allow_unused=True)
    return loss.detach().double(), torch.cat([g.flatten().double() for g in gradients if g is not None])


def _difference(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> Difference:
    (loss, gradient), (exact_loss, exact) = ours, theirs
    norm = exact.norm().clamp(min=1e-300)
    return Difference(
        float((loss - exact_loss).abs() / exact_loss.abs().clamp(min=1e-12)),
        float((gradient - exact).norm() / norm),
        float(torch.nn.functional.cosine_similarity(gradient, exact, dim=0, eps=1e-300)),
    )


def _worst(differences: list[Difference]) -> Difference:
    losses, gradients, cosines = zip(*differences, strict=True)
    return Difference(max(losses), max(gradients), min(cosines))

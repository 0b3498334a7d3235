"""Recipes against the published settings that they claim."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastkd.distill import find_method
from fastkd.models import build_model
from fastkd.recipe.files import shipped_recipes
from fastkd.recipe.schema import load_recipe
from fastkd.recipe.sections import Recipe

DHKD = [name for name in shipped_recipes() if name.startswith(("cifar100/dhkd", "imagenet/r18-dhkd"))]
WITH_FEATURES = [name for name in shipped_recipes() if name.startswith(("cifar100/mhkd", "cifar100/dckd"))]


def load(name: str) -> Recipe:
    return load_recipe(name)[1]


def shows(recipe: Recipe, **options: Any) -> None:
    assert {name: recipe.options[name] for name in options} == options


@pytest.mark.parametrize("name", DHKD)
def test_dhkd_is_that_of_the_released_code(name: str) -> None:
    recipe = load(name)
    train = recipe.train
    shared = {"ce_weight": 1.0, "temperature": 2.0, "center_teacher": False}
    if name.startswith("imagenet"):
        # Alpha is 0 from epoch 50 on, counted from 1.
        shows(recipe, **shared, alpha=0.1, head="linear", align="none", stop_epoch=49)
        expected = (0.1, 1e-4, 100, [30, 60, 90], 256)
    else:
        shows(
            recipe,
            **shared,
            alpha=1.0,
            head="nonlinear",
            hidden=200,
            dropout=0.1,
            align="all",
            stop_epoch=None,
        )
        light = recipe.student.name in ("mobilenet_v2", "shufflenet_v1", "shufflenet_v2")
        expected = (0.01 if light else 0.05, 5e-4, 240, [150, 180, 210], 64)
        assert recipe.teacher is not None
        assert recipe.teacher.lr == 0.05
    assert (train.lr, train.weight_decay, train.epochs, train.milestones, train.batch_size) == expected
    assert train.optimizer == "sgd"
    assert "as published" not in recipe.description
    assert ("released command" in recipe.description) == (name == "cifar100/dhkd-resnet32x4-shufflenet-v2")


def test_imagenet_distils_in_49_epochs() -> None:
    recipe = load("imagenet/r18-dhkd")
    models = [build_model(name, num_classes=5) for name in ("resnet8", "resnet8")]
    method = find_method("dhkd")(*models, **recipe.options)
    distilled = []
    for epoch in range(recipe.train.epochs):
        method.set_epoch(epoch)
        distilled.append(method.needs_teacher())
    assert distilled == [True] * 49 + [False] * 51


def test_mhkd_of_the_first_author_and_of_others() -> None:
    for name in (
        "cifar100/mhkd-resnet32x4-resnet8x4",
        "cifar100/mhkd-resnet50-mobilenet-v2",
        "imagenet/r18-mhkd",
    ):
        shows(load(name), ce_weight=1.0, alpha=1.0, beta=1.0, temperature=4.0, head_kd=0.9, head_width=256)
        shows(load(name), head_linears=1)
    others = load("cifar100/mhkd-dih-resnet32x4-resnet8x4")
    shows(others, ce_weight=0.1, alpha=0.9, beta=0.5, temperature=4.0, head_linears=2)


def test_dckd_is_combined_with_another_method() -> None:
    hint, rkd = (load(f"cifar100/{name}-resnet32x4-resnet8x4") for name in ("dckd", "dckd-rkd"))
    for recipe in (hint, rkd):
        shows(
            recipe,
            ce_weight=1.0,
            alpha=1.0,
            beta=8.0,
            temperature=4.0,
            warmup_epochs=20,
            fix_acquired="teacher",
        )
    shows(hint, hint_layer="layer2", hint_weight=100.0, distance_weight=0.0, angle_weight=0.0)
    shows(rkd, hint_weight=0.0, distance_weight=25.0, angle_weight=50.0)


@pytest.mark.parametrize("pair", ["r18", "mbv1"])
def test_dckd_on_imagenet_is_dkd_but_for_what_is_acquired(pair: str) -> None:
    dkd, dckd, hint = (load(f"imagenet/{pair}-{name}") for name in ("dkd", "dckd", "dckd-hint"))
    assert {**dkd.options, "fix_acquired": "teacher"} == dckd.options
    asked = {name: hint.options[name] for name in ("hint_layer", "hint_teacher_layer", "hint_weight")}
    assert {**dckd.options, **asked} == hint.options
    assert hint.options["hint_weight"] == 100.0
    assert dkd.train == dckd.train == hint.train
    assert dkd.teacher == dckd.teacher == hint.teacher
    for recipe in (dckd, hint):
        text = shipped_recipes()[f"imagenet/{pair}-{'dckd' if recipe is dckd else 'dckd-hint'}"].read_text()
        assert text.startswith("# Target: not known")


@pytest.mark.parametrize("name", WITH_FEATURES)
def test_layers_exist(name: str) -> None:
    recipe = load(name)
    assert recipe.teacher is not None
    networks = [build_model(model.name, num_classes=100) for model in (recipe.student, recipe.teacher)]
    images = torch.randn(2, 3, 32, 32)
    method = find_method(recipe.method)(*networks, example=images, **recipe.options)
    method.check((images, torch.tensor([3, 5])))
    if name == "cifar100/mhkd-resnet50-mobilenet-v2":
        (student, _), (teacher, _) = method.all_shapes()
        for of_student, of_teacher in method.pairs:
            pair = student[of_student], teacher[of_teacher]
            assert all(pair[0][dim] < pair[1][dim] for dim in (1, 2, 3))

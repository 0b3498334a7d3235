"""Bad inputs of models, optimizers, loaders, images and checkpoints, as rows of docs/trainer-bad-inputs.md.

Each row: the input, what must happen, and a function that tries it in the working directory and returns what
happened, or raises ``AssertionError`` if it was something else.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import SGD, lr_scheduler

import fastkd
from fastkd.cli import main
from fastkd.data.files import load_file_data
from fastkd.data.pixels import to_rgb
from fastkd.distill import DHKD, KD
from fastkd.models import build_model
from fastkd.recipe.schema import load_recipe
from fastkd.recipe.sections import FolderData
from fastkd.train import fit, fit_method
from fastkd.train.run.weights import load_weights
from tests.train.tiny import CLASSES, Loader, Net, Notes, labels_alone

Row = tuple[str, str, Callable[[], str]]
IMAGES, TARGET = Loader().images[:8], Loader().target[:8]
GOOD = [(IMAGES, TARGET)]
KD_LOSS = fastkd.DistillLoss(ce_weight=0.1, kd_weight=0.9)
SHORT = ["data.synthetic=9", "train.epochs=1", "train.batch_size=8", "teacher.epochs=1", "train.device=cpu"]


def raised(words: str, do: Callable[[], Any]) -> str:
    """The message of the error, which must contain ``words``."""
    try:
        do()
    except Exception as error:
        text = " ".join(str(error).split())
        assert words in text, text
        return f"{type(error).__name__}: {short(text)}"
    raise AssertionError("nothing was raised")


def short(text: str) -> str:
    text = text.replace(str(Path.cwd()) + os.sep, "").replace("|", "/")
    return text if len(text) < 230 else text[:230] + " …"


def command(*words: str) -> tuple[int, str]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        status = main(list(words))
    return status, " ".join(text.getvalue().split())


def refused(words: str, *arguments: str) -> str:
    """The message of the command, which must not train anything."""
    status, text = command("train", *arguments)
    assert status == 2, text
    assert words in text, text
    assert "Traceback" not in text
    assert not Path("runs").exists(), "a run folder was made"
    return f"status 2: {short(text[text.index('fastkd: error: ') + 15 :])}"


def trained(*arguments: str, says: str = "") -> str:
    status, text = command("train", *arguments)
    assert status == 0, text
    assert says in text, text
    assert list(Path("runs").glob("*/summary.json"))
    return "trained" + (f"; it said: {says} …" if says else "")


def with_module(name: str, code: str) -> None:
    Path(f"{name}.py").write_text("import torch\nfrom torch import nn\n" + code)


def train_method(method: Any, **options: Any) -> Any:
    options = {"epochs": 1, "progress": False, **options}
    return fit_method(method, options.pop("train", GOOD), options.pop("val", GOOD), **options)


def fit_with(train: Any = GOOD, val: Any = GOOD, teacher: Any = None, loss: Any = None, **more: Any) -> Any:
    options = {"epochs": 1, "progress": False, **more}
    student = options.pop("student", None) or Net(4)
    return fit(student, teacher, train, val, loss=loss or labels_alone, **options)


def without_heads() -> str:
    method = DHKD(Net(4), Net(6))
    return raised(
        "it lacks head.", lambda: train_method(method, optimizer=SGD(method.student.parameters(), 0.1))
    )


def of_another_network() -> str:
    optimizer = SGD(Net(4).parameters(), 0.1)
    return raised("has a parameter of shape", lambda: train_method(KD(Net(4), Net(6)), optimizer=optimizer))


def of_the_teacher() -> str:
    method = KD(Net(4), Net(6))
    optimizer = SGD([*method.parameters(), *method.teacher.parameters()], 0.1)
    return raised("has teacher.features", lambda: train_method(method, optimizer=optimizer))


def another_scheduler() -> str:
    method = KD(Net(4), Net(6))
    optimizer, other = SGD(method.parameters(), 0.1), SGD(method.parameters(), 0.1)
    scheduler = lr_scheduler.ExponentialLR(other, 0.9)
    return raised(
        "belongs to another", lambda: train_method(method, optimizer=optimizer, scheduler=scheduler)
    )


def short_scheduler() -> str:
    method = KD(Net(4), Net(6))
    optimizer = SGD(method.parameters(), 0.1)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=2)
    options = {"optimizer": optimizer, "scheduler": scheduler, "epochs": 5}
    return raised("ends after 2 steps, but there are 5", lambda: train_method(method, **options))


def weight_norm() -> str:
    student = Net(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(student.fc)
    student(IMAGES)
    return raised("parametrizations.weight_norm", lambda: fit_with(student=student, ema=0.9))


def videos() -> str:
    student = nn.Sequential(nn.Conv3d(3, 4, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    batch = [(torch.randn(4, 3, 2, 4, 4), torch.arange(4))]
    return raised("[N, C, H, W]", lambda: fit_with(batch, batch, student=student, channels_last=True))


def shared() -> str:
    student, teacher = Net(4), Net(4)
    teacher.features[0] = student.features[0]
    return raised("share features.0", lambda: fit_with(student=student, teacher=teacher, loss=KD_LOSS))


class Form(nn.Module):
    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.form = Net(4), form

    def forward(self, images: Tensor) -> Any:
        return self.form(self.net(images))


def named_output() -> str:
    result = fit_with(student=Form(lambda z: {"logits": z, "hidden": z}), teacher=Net(6), loss=KD_LOSS)
    assert result.history[0]["rows"] == 8
    return "trained on the entry logits"


def tuple_output() -> str:
    return raised("a tuple of 2", lambda: KD(Form(lambda z: (z, z)), Net(6))(GOOD[0]))


def last_of_one() -> str:
    watcher = Notes()
    student = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, CLASSES))
    loader = Loader(17, 16)
    record = fit_with(loader, loader, student=student, watcher=watcher).last
    assert record["rows"] == 16
    return f"trained on 16 images; it said: {short(watcher.notes[0])}"


def tuple_in_train_mode() -> str:
    with_module(
        "bad_tuple",
        "class Net(nn.Module):\n    def __init__(self, num_classes):\n        super().__init__()\n"
        "        self.fc = nn.Linear(784, num_classes)\n    def forward(self, x):\n"
        "        z = self.fc(x.flatten(1))\n        return (z, z) if self.training else z\n",
    )
    return refused(
        "the student returns a tuple of 2", "fashion-mnist/kd", *SHORT, "student.name=bad_tuple:Net"
    )


def recipe_last_of_one() -> str:
    with_module(
        "bad_norm",
        "def net(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), "
        "nn.Linear(784, num_classes))\n",
    )
    words = ["fashion-mnist/kd", *SHORT, "student.name=bad_norm:net"]
    return trained(*words, says="a batch of 1 image cannot be trained on and is left out in each epoch")


def inception() -> str:
    Path("mine.yaml").write_text(
        "description: x\ndata.name: synthetic\ndata.images: 2\ndata.classes: 4\ndata.size: 64\n"
        "student.name: torchvision/inception_v3\nmethod: cross_entropy\ntrain.epochs: 1\n"
    )
    return refused("RuntimeError: Calculated padded input size", "mine.yaml", "train.device=cpu")


def another_method() -> str:
    name, recipe = load_recipe("glyphs/kd", ["method=dkd"])
    assert name == "glyphs/kd method=dkd"
    assert "decoupled" in recipe.description
    assert "temperature 4" not in recipe.description
    return f"{name}: {short(recipe.description)}"


def width_of_another() -> str:
    _, recipe = load_recipe("fashion-mnist/kd", ["student.name=torchvision/resnet18"])
    assert recipe.student.width is None
    return "no width"


def hidden_folder() -> str:
    for folder in ("train/a", "train/b", "train/.ipynb_checkpoints", "val/a", "val/b"):
        Path("tree", folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(Path("tree", folder, "0.png"))
    data = load_file_data(FolderData(name="imagefolder", root="tree", workers=0))
    assert data.source.classes == ["a", "b"]
    return f"2 classes; it said: {short(data.notes[0])}"


def sixteen_bits() -> str:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (8, 1))
    Image.fromarray(ramp).save("grey.png")
    with Image.open("grey.png") as image:
        pixels = np.asarray(to_rgb(image))
    assert abs(pixels.mean() - 127.5) < 1
    return f"mean {pixels.mean():.1f} of 255, {(pixels == 255).mean():.1%} at 255"


def float_pixels() -> str:
    return raised("do not define which value is white", lambda: to_rgb(Image.new("F", (4, 4))))


def checkpoint(content: Any) -> nn.Module:
    torch.save(content, "w.pt")
    model = build_model("small_cnn", num_classes=4, width=2)
    load_weights(model, Path("w.pt"), num_classes=4, remedy="give another file")
    return model


def read_from(form: Callable[[dict[str, Tensor]], Any]) -> Callable[[], str]:
    def run() -> str:
        state = build_model("small_cnn", num_classes=4, width=2).state_dict()
        model = checkpoint(form(state))
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        return "read"

    return run


class Own:
    pass


def own_class() -> str:
    state = build_model("small_cnn", num_classes=4, width=2).state_dict()
    text = raised("bad_inputs.models.Own", lambda: checkpoint({"model": state, "config": Own()}))
    assert "weights_only" not in text
    return text


def nowhere() -> str:
    return raised("it has epoch, lr", lambda: checkpoint({"epoch": 3, "lr": 0.1}))


def environment(name: str, text: str, run: Callable[[], str]) -> Callable[[], str]:
    def do() -> str:
        before = os.environ.get(name)
        os.environ[name] = text
        try:
            return run()
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before

    return do


STUDENT = ["fashion-mnist/student", "data.synthetic=9", "train.epochs=1", "train.device=cpu"]
BEFORE = "an error before training"
WORKS = "it trains"

ROWS: list[Row] = [
    ("an optimizer without the method's heads", f"{BEFORE} that names some", without_heads),
    ("an optimizer of another network", f"{BEFORE} that names what it lacks and has", of_another_network),
    ("an optimizer with the teacher's parameters", f"{BEFORE} that names some", of_the_teacher),
    ("a scheduler of another optimizer", BEFORE, another_scheduler),
    ("a OneCycleLR of 2 steps for 5", BEFORE, short_scheduler),
    ("`weight_norm` with `ema=`", f"{BEFORE} that names the layer and what can be copied", weight_norm),
    ("`channels_last` with 5-D weights", f"{BEFORE} that names the parameter", videos),
    ("a student and a teacher that share a layer", f"{BEFORE} that names the layer", shared),
    ("an output `{'logits': …}`, as of Hugging Face", WORKS, named_output),
    ("an output that is a tuple", "an error that describes the output", tuple_output),
    ("the best epoch with `val_loader=None`", "an error that says that there is none",
     lambda: raised("use last", lambda: fit_with(val=None).best)),
    ("a loader of dicts", f"{BEFORE} that names its keys",
     lambda: raised("a dict with pixel_values, labels",
                    lambda: fit_with([{"pixel_values": IMAGES, "labels": TARGET}]))),
    ("a generator for several epochs", BEFORE,
     lambda: raised("a generator can be iterated once", lambda: fit_with(iter(b for b in GOOD), epochs=2))),
    ("a validation label out of range", BEFORE,
     lambda: raised("validation fails", lambda: fit_with(val=[(IMAGES, TARGET + 50)]))),
    ("no teacher, and a loss that distils", "an error that says so",
     lambda: raised("teacher is None", lambda: fit_with(loss=KD_LOSS))),
    ("no teacher, `DistillLoss(ce_weight=1., kd_weight=0.)`", WORKS,
     lambda: f"trained, loss {fit_with(loss=fastkd.DistillLoss(ce_weight=1.0)).last['loss']:.3f}"),
    ("a loss of two arguments", f"{BEFORE} that says which three",
     lambda: raised("teacher_logits, target)", lambda: fit_with(loss=nn.CrossEntropyLoss()))),
    ("17 images at batch 16, BatchNorm of [N, D]", "the last image is left out, with a note", last_of_one),
    ("the same in a recipe", "noted before training, then it trains", recipe_last_of_one),
    ("a student that returns a tuple in train mode", f"{BEFORE}, the teacher's too", tuple_in_train_mode),
    ("Inception at 64 pixels", f"{BEFORE} with the layer's reason", inception),
    ("`glyphs/kd method=dkd`", "name and description match", another_method),
    ("`student.name=torchvision/resnet18` over a width", "the recipe's width goes with its network",
     width_of_another),
    ("`teacher.epochs=3` and no teacher", BEFORE,
     lambda: refused("teacher.epochs is given, but", "glyphs/student", "teacher.epochs=3")),
    ("`WORLD_SIZE=\"\"`", WORKS, environment("WORLD_SIZE", "", lambda: trained(*STUDENT))),
    ("`WORLD_SIZE=two`", f"{BEFORE} that names the variable",
     environment("WORLD_SIZE", "two", lambda: refused("WORLD_SIZE is 'two'", *STUDENT))),
    ("a hidden folder `.ipynb_checkpoints` of images", "ignored, with a note", hidden_folder),
    ("a 16-bit grey PNG", "it keeps its brightness", sixteen_bits),
    ("floating-point pixels", "skipped as an image that cannot be read, with the reason", float_pixels),
    ("a checkpoint with `model_state_dict`", "it is read", read_from(lambda s: {"model_state_dict": s})),
    ("a checkpoint with `net`", "it is read", read_from(lambda s: {"net": s, "acc": 0.5})),
    ("Lightning's `state_dict` with `model.` and a loss", "it is read",
     read_from(lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()} | {"w": torch.ones(1)}})),
    ("a checkpoint with a Namespace and NumPy's numbers", "it is read, and no code is run",
     read_from(lambda s: {"model": s, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.7)})),
    ("a checkpoint without `num_batches_tracked`", "it is read",
     read_from(lambda s: {k: v for k, v in s.items() if "num_batches" not in k})),
    ("a checkpoint with a custom class", "an error that names the class and a safe way out", own_class),
    ("a checkpoint without weights", "an error that lists its entries", nowhere),
]  # fmt: skip

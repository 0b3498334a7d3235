"""Images of the user's own in train.npz and test.npz."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .common import TRAIN, Row, refused, run_folder, succeeds

COMMAND = ["train", TRAIN[0], *TRAIN[2:], "data.name=arrays", "data.folder=own"]
AS_TEACHER = [*COMMAND[1:], "method=kd", "teacher.name=small_cnn", "teacher.width=2"]


def write_arrays(train: dict[str, Any], test: dict[str, Any]) -> None:
    """own/train.npz and own/test.npz of 20 images of 3 classes, changed as told; None leaves an array out."""
    Path("own").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), np.uint8)
    for part, changes in (("train", train), ("test", test)):
        arrays: dict[str, Any] = {"images": images, "target": np.arange(20) % 3, **changes}
        np.savez(Path("own", part), **{key: value for key, value in arrays.items() if value is not None})


def here() -> str:
    return os.getcwd() + "/"


def arrays(words: str, test: dict[str, Any] | None = None, **train: Any) -> Callable[[], str]:
    def act() -> str:
        write_arrays(train, test or {})
        return refused(COMMAND, "data.folder", words).replace(here(), "")

    return act


def damaged(damage: Callable[[Path], object], words: str) -> Callable[[], str]:
    """``damage`` changes a valid own/train.npz."""

    def act() -> str:
        write_arrays({}, {})
        damage(Path("own/train.npz"))
        return refused(COMMAND, "data.folder", "own/train.npz", words).replace(here(), "")

    return act


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def save_npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def pixels(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, *shape), np.uint8)


def no_folder() -> str:
    return refused(COMMAND, "data.folder", "is not a folder").replace(here(), "")


def no_test_file() -> str:
    write_arrays({}, {})
    Path("own/test.npz").unlink()
    return refused(COMMAND, "has no test.npz").replace(here(), "")


def checkpoint_of_other_classes(*command: str) -> Callable[[], str]:
    """A network of the classes a, b, c, used for data with the classes c, b, a."""

    def act() -> str:
        write_arrays({"classes": NAMES}, {"classes": NAMES})
        succeeds(*COMMAND)
        shutil.rmtree("own")
        write_arrays({"classes": NAMES[::-1], "target": LABELS[::-1]}, {"classes": NAMES[::-1]})
        words = [word.format(run=run_folder()) for word in command]
        return refused(words, "best.pt", "class 0 is 'a', expected 'c'").replace(here(), "")

    return act


def one_constant_channel() -> np.ndarray:
    images = pixels(20, 3, 8, 8)
    images[:, 1] = 17
    return images


NAMES = np.array(["a", "b", "c"])
LABELS = np.arange(20) % 3
TOO_LARGE = np.full(20, 2**63, np.uint64)
PICKLED = np.array(["a", "b", None], object)
SHAPE = "expected uint8 [N, C, H, W] with H = W"

ARRAYS: list[Row] = [
    ("`data.name=arrays` without its folder", "refused", no_folder),
    ("no test.npz", "refused", no_test_file),
    ("train.npz without `target`", "refused by file and key", arrays("no array 'target'", target=None)),
    ("test.npz without `images`", "refused", arrays("no array 'images'", test={"images": None})),
    ("`images` of float32", "refused by type", arrays(SHAPE, images=np.zeros((20, 3, 8, 8), np.float32))),
    ("`images` [N, H, W]", "refused by shape", arrays(SHAPE, images=pixels(20, 8, 8))),
    ("`images` [N, H, W, C]", "refused by shape", arrays(SHAPE, images=pixels(20, 8, 8, 3))),
    ("`images` with a side of 0", "refused by shape", arrays(SHAPE, images=pixels(20, 3, 0, 0))),
    ("`target` of float64", "refused by type", arrays("float64 [20]", target=LABELS / 1)),
    ("`target` [N, C]", "refused by shape", arrays("int64 [20, 3]", target=np.eye(20, 3, dtype=np.int64))),
    ("20 images, 19 labels", "refused", arrays("20 images and 19 labels", target=LABELS[:19])),
    (
        "train.npz without an image",
        "refused",
        arrays("no images", images=pixels(0, 3, 8, 8), target=LABELS[:0]),
    ),
    ("a label -1", "refused by value", arrays("has -1", target=LABELS - 1)),
    (
        "a label 2⁶³",
        "refused by value",
        arrays("has 9223372036854775808", target=TOO_LARGE),
    ),
    ("one class", "refused", arrays("has 1 class", target=LABELS * 0)),
    ("a label of test.npz that train.npz has not", "refused", arrays("up to 5", test={"target": LABELS + 3})),
    (
        "a label 2 of two named classes",
        "refused",
        arrays("up to 2, expected 0 to 1", classes=np.array(["a", "b"])),
    ),
    (
        "names of classes that are no UTF-8",
        "refused by name",
        arrays(r"a name 'caf\udce9'", classes=np.array(["a", "caf\udce9", "c"])),
    ),
    ("names of classes that are numbers", "refused", arrays("one string per class", classes=np.arange(3))),
    (
        "the classes of test.npz in another order than in train.npz",
        "refused by the first difference",
        arrays("class 0 is 'c', expected 'a'", test={"classes": NAMES[::-1]}, classes=NAMES),
    ),
    (
        "test.npz that names one class fewer",
        "refused by the first difference",
        arrays("class 2 is missing, expected 'c'", test={"classes": NAMES[:2]}, classes=NAMES),
    ),
    (
        "images of test.npz of another shape",
        "refused",
        arrays("1 x 8 x 8", test={"images": pixels(20, 1, 8, 8)}),
    ),
    (
        "`teacher.checkpoint` of the same classes in another order",
        "refused by the first difference",
        checkpoint_of_other_classes("train", *AS_TEACHER, "teacher.checkpoint={run}/best.pt"),
    ),
    (
        "`--resume RUN --eval-only` after the classes got another order",
        "refused by the first difference",
        checkpoint_of_other_classes("train", "--resume", "{run}", "--eval-only"),
    ),
    ("a constant channel", "refused: its std is 0", arrays("channel 1", images=one_constant_channel())),
    ("pickled names of classes", "refused, no code is run", arrays("pickled", classes=PICKLED)),
    ("train.npz cut short", "refused by file", damaged(lambda p: os.truncate(p, 3000), "cannot be read")),
    ("train.npz with a changed byte", "refused by file", damaged(flip_a_byte, "cannot be read")),
    (
        "train.npz that is a text",
        "refused by file",
        damaged(lambda p: p.write_text("images"), "no .npz file"),
    ),
    ("train.npz that is empty", "refused by file", damaged(lambda p: p.write_bytes(b""), "cannot be read")),
    ("train.npz that is a .npy", "refused by file", damaged(save_npy, ".npy")),
    ("train.npz that is a FIFO", "refused, no waiting", damaged(make_fifo, "FIFO")),
]

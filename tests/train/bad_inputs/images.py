"""Images, shards and data workers."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .common import FILES, ROOT, SECONDS, TRAIN, Row, in_subprocess, jpeg, refused, run_folder, succeeds, tree


def instead_of_an_image(make: Callable[[Path], object], kind: str) -> Callable[[], str]:
    def act() -> str:
        tree()
        path = Path("tree/train/a/0.jpg")
        path.unlink()
        make(path)
        succeeds("train", *FILES)
        (name, reason), *others = json.loads((run_folder() / "summary.json").read_text())[
            "corrupt_images"
        ].items()
        assert name.endswith("tree/train/a/0.jpg")
        assert kind in reason
        assert not others
        return f"skipped: {reason.replace(os.getcwd() + '/', '')}"

    return act


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def zero_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder_named_as_an_image() -> str:
    tree()
    Path("tree/train/a/9.jpg").mkdir()
    succeeds("train", *FILES)
    return "no image: trained without it"


def class_folder_not_utf8() -> str:
    tree()
    for part in ("train", "val"):
        os.rename(f"tree/{part}/a", os.fsencode(f"tree/{part}/caf") + b"\xe9")
    return refused(["train", *FILES], r"the class folder b'caf\xe9'", "rename it").replace(
        os.getcwd() + "/", ""
    )


def image_not_utf8() -> str:
    tree()
    os.rename("tree/train/a/0.jpg", b"tree/train/a/caf\xe9.jpg")
    os.truncate(b"tree/train/a/caf\xe9.jpg", 0)
    (name,) = json.loads(succeeds("train", *FILES, "--json"))["corrupt_images"]
    assert os.fsencode(name).endswith(b"tree/train/a/caf\xe9.jpg")
    return "skipped and named, also by --json"


def tars(count: int, cls: str = "{label}") -> None:
    Path("shards").mkdir()
    jpeg(Path("one.jpg"))
    image = Path("one.jpg").read_bytes()
    for part, number in (("train", count), ("val", 1)):
        for shard in range(number):
            with tarfile.open(f"shards/{part}-{shard:04d}.tar", "w") as archive:
                for label in range(2):
                    text = cls.format(label=label).encode()
                    for suffix, content in (("jpg", image), ("cls", text)):
                        entry = tarfile.TarInfo(f"s{shard}-{label}.{suffix}")
                        entry.size = len(content)
                        archive.addfile(entry, io.BytesIO(content))


SHARDS = [FILES[0], "data.name=webdataset", "data.root=shards", *FILES[2:], "data.classes=2"]


def more_shards_than_open_files(workers: int) -> Callable[[], str]:
    def act() -> str:
        tars(120)
        options = ["train.epochs=3", f"data.workers={workers}", "data.corrupt_limit=0"]
        # torch itself opens about 30 files, and workers share memory through descriptors too.
        status, text = in_subprocess("train", *SHARDS, *options, limits="ulimit -n 100")
        assert status == 0, text
        summary = json.loads((run_folder() / "summary.json").read_text())
        assert summary["corrupt_images"] == {}
        records = (run_folder() / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(record)["rows"] for record in records] == [240] * 3
        return "3 epochs trained, all 240 images in each, none called corrupt"

    return act


def no_descriptor_for_an_image() -> str:
    tree()
    from fastkd.data import sources

    read = sources.FolderSource.read

    def fails(self: Any, index: int) -> bytes:
        raise OSError(24, "Too many open files")

    sources.FolderSource.read = fails  # type: ignore[method-assign]
    try:
        return refused(["train", *FILES], "Too many open files (an error of this machine, not of the image)")
    finally:
        sources.FolderSource.read = read  # type: ignore[method-assign]


def shard_label(text: str) -> Callable[[], str]:
    def act() -> str:
        tars(1, cls=text)
        return refused(["train", *SHARDS[:-1]], "s0-0.cls", "expected a number from 0")

    return act


def shard_pattern(pattern: str, *words: str) -> Callable[[], str]:
    def act() -> str:
        tars(1)
        return refused(["train", *SHARDS, f"data.train={pattern}"], *words)

    return act


def absolute_shards() -> str:
    tars(2)
    succeeds("train", *SHARDS, f"data.train={Path('shards').absolute()}/train-*.tar")
    return "trained from them"


def empty_folders(part: str) -> Callable[[], str]:
    def act() -> str:
        tree()
        for image in Path("tree", part).rglob("*.jpg"):
            image.unlink()
        return refused(["train", *FILES], f"tree/{part}").replace(os.getcwd() + "/", "")

    return act


def empty_shards() -> str:
    tars(1)
    with tarfile.open("shards/val-0000.tar", "w"):
        pass
    return refused(["train", *SHARDS], "val-*.tar", "hold no sample").replace(os.getcwd() + "/", "")


def killed_worker() -> str:
    tree()
    Path("killer.py").write_text(
        "import os, signal, sys, threading, time, torch\n"
        "from fastkd.data import files\n"
        "from fastkd.cli import main\n"
        "original = files.Samples.__getitem__\n"
        "def dies(self, key):\n"
        "    if torch.utils.data.get_worker_info(): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(self, key)\n"
        "files.Samples.__getitem__ = dies\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "killer.py", "train", *FILES, "data.workers=1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "a data worker is killed by signal: Killed" in done.stderr or "worker exited" in done.stderr
    return done.stderr.strip().splitlines()[-1].removeprefix("fastkd: error: ")


def idx(name: str, values: np.ndarray) -> None:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    Path("fashion", name).write_bytes(
        bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()
    )


def fashion_mnist(count: int, label: int, side: int, *words: str) -> Callable[[], str]:
    def act() -> str:
        Path("fashion").mkdir()
        for stem in ("train", "t10k"):
            idx(f"{stem}-images-idx3-ubyte", np.zeros((count, side, side)))
            idx(f"{stem}-labels-idx1-ubyte", np.full(count, label))
        return refused(["train", TRAIN[0], *TRAIN[2:], "data.folder=fashion"], "data.folder", *words).replace(
            os.getcwd() + "/", ""
        )

    return act


IMAGES: list[Row] = [
    ("a FIFO as an image", "skipped and named, no waiting", instead_of_an_image(os.mkfifo, "FIFO")),
    ("a device as an image", "skipped and named, never opened", instead_of_an_image(zero_device, "device")),
    ("a socket as an image", "skipped and named", instead_of_an_image(make_socket, "socket")),
    ("a folder named 9.jpg", "no image", folder_named_as_an_image),
    (
        "120 shards, 100 files may be open",
        "at most a quarter of them stay open; trained",
        more_shards_than_open_files(0),
    ),
    (
        "the same with two data workers",
        "trained, no silent hang",
        more_shards_than_open_files(2),
    ),
    (
        "no file descriptor left for an image",
        "the machine's error, not a corrupt image",
        no_descriptor_for_an_image,
    ),
    ("a `.cls` of 1e30 (31 digits)", "refused by shard and sample", shard_label("1" + "0" * 30)),
    ("a `.cls` of 5,000 digits", "refused by shard and sample", shard_label("9" * 5000)),
    ("a `.cls` of 999999999", "refused: no network has so many outputs", shard_label("999999999")),
    ("an absolute shard pattern with `*`", "trained from", absolute_shards),
    (
        "a shard pattern of 10¹¹ names",
        "refused, not expanded",
        shard_pattern("t-{0..99999999999}.tar", "at most 1,000,000"),
    ),
    ("a shard pattern `a**b/*.tar`", "refused in one line", shard_pattern("/a**b/*.tar", "shard")),
    ("a class folder whose name is no UTF-8", "refused before training", class_folder_not_utf8),
    ("an empty image whose name is no UTF-8", "skipped and named", image_not_utf8),
    ("class folders without an image", "refused by folder", empty_folders("train")),
    ("the same in `data.val`", "refused by folder", empty_folders("val")),
    ("a shard without a sample", "refused by pattern", empty_shards),
    ("a data worker that the system kills", "one line with the cause", killed_worker),
    (
        "`data.workers=100000`",
        "refused by name",
        lambda: refused(["train", *FILES, "data.workers=100000"], "data.workers = 100000", "256"),
    ),
    (
        "Fashion-MNIST with a label 200",
        "refused: labels are 0 to 9",
        fashion_mnist(20, 200, 28, "up to 200"),
    ),
    ("Fashion-MNIST without an image", "refused", fashion_mnist(0, 0, 28, "no train images")),
    ("Fashion-MNIST with images of 30 x 30", "refused", fashion_mnist(20, 1, 30, "30 x 30")),
]

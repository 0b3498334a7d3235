"""Bad inputs to the trainer and what becomes of them.

`python tests/train/bad_inputs.py > docs/trainer-bad-inputs.md` makes a table of it. ROWS are (input, what
must happen, function that makes it happen in an empty working directory and returns what did).
`test_bad_inputs.py` runs each.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __name__ == "__main__":  # as a script, from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fastkd.cli import main
from fastkd.train.run.checkpoint import load_checkpoint
from tests.train.bad_inputs_models import ROWS as OF_MODELS

Row = tuple[str, str, Callable[..., str]]

TRAIN = [
    "fashion-mnist/student", "data.synthetic=40", "student.width=2", "train.epochs=1", "train.batch_size=16",
    "train.device=cpu", "train.threads=1",
]  # fmt: skip
RUN = "runs/fashion-mnist-student-001"
CONSTANT = "train.schedule=constant"
SECONDS = 100  # of a row: one that takes longer hangs


def run(*arguments: str) -> tuple[int, str, str]:
    """Status, output and errors of a command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(arguments))
    return status, out.getvalue(), err.getvalue()


def refused(arguments: list[str], *words: str) -> str:
    """The error of a command that must end with status 2 and one line with ``words``."""
    status, _, text = run(*arguments)
    assert status == 2, f"status {status}: {text}"
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert "weights_only" not in text
    for word in words:
        assert word in text, text
    return lines[0].removeprefix("fastkd: error: ")


def succeeds(*arguments: str) -> str:
    status, out, text = run(*arguments)
    assert status == 0, text
    return out


def in_subprocess(*arguments: str, limits: str = "", timeout: float = SECONDS) -> tuple[int, str]:
    """Status and errors of a command in a shell of its own, under limits such as ``ulimit -n 64``."""
    command = [sys.executable, "-m", "fastkd", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        ["bash", "-c", f'{limits or "true"} && exec "$@"', "bash", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


# Recipes


def override(text: str, *words: str) -> Callable[[], str]:
    return lambda: refused(["train", *TRAIN, text], text.partition("=")[0], *words)


def recipe_file(more: str, *words: str) -> Callable[[], str]:
    def act() -> str:
        Path("r.yaml").write_text(
            f"description: x\nmethod: cross_entropy\nstudent.width: 2\ntrain.epochs: 1\n{more}\n"
        )
        return refused(["train", "r.yaml"], "r.yaml", *words)

    return act


ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 30))
RECIPES: list[Row] = [
    (f"`{text[:30]}{'…' if len(text) > 30 else ''}`", must, override(text, *words))
    for text, must, words in (
        ("train.epochs=0x1", "refused: no decimal number", ["'0x1' (str)", "valid integer"]),
        ("train.epochs=01", "refused: no decimal number", ["'01' (str)"]),
        ("train.epochs=1_0", "refused: no decimal number", ["'1_0' (str)"]),
        ("train.epochs=0b_", "refused by name", ["'0b_' (str)"]),
        ("train.lr=1:30.5", "refused: no decimal number", ["'1:30.5' (str)", "valid number"]),
        ("train.lr=1e999", "refused: not rounded to infinity", ["beyond those of float64"]),
        ("train.lr=1e-999", "refused: not rounded to zero", ["beyond those of float64"]),
        ("train.epochs=!!int foo", "refused by name", ["tags such as"]),
        ("train.lr=2024-13-45", "refused by name", ["'2024-13-45' (str)"]),
        ("train.epochs=" + "9" * 5000, "refused, the digits cut short", ["9999...", "valid integer"]),
        ("train.epochs=" + "[" * 5000, "refused by name", ["nested too deeply"]),
        ("data.synthetic=0", "refused, the whole key named", ["data.synthetic = 0", "greater than"]),
        ("data.synthetic=1" + "0" * 15, "refused, no attempt at the memory", ["data.synthetic"]),
        ("data.name=[a]", "refused by name", ["data.name = ['a'] is unknown"]),
        ("train.tensorboard=yes", "refused: only true and false are", ["'yes' (str)", "boolean"]),
    )
] + [
    ("aliases that stand for 9³⁰ values, in 1 KB", "refused at once", recipe_file(ALIASES, "aliases")),
    ("keys `1:` and `[a]:`", "refused by name", recipe_file("1: 2\n? [a]\n: 3", "key is a list")),
    ("a key `1:`", "refused by name", recipe_file("1: 2", "unknown key '1'")),
    ("two documents in a recipe", "one line", recipe_file("---\nx: 1", "not valid YAML")),
]


# Images


def jpeg(path: Path, seed: int = 0) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(path, "JPEG")


def tree() -> None:
    for part, count in (("train", 4), ("val", 2)):
        for label in "ab":
            for number in range(count):
                jpeg(Path("tree", part, label, f"{number}.jpg"), number)


def run_folder() -> Path:
    """The one run; its name says which network and method were chosen instead of the recipe's."""
    (folder,) = Path("runs").glob("*-001")
    return folder


FILES = [
    "imagenet/r18", "data.root=tree", "data.size=24", "student.name=small_cnn", "student.width=2",
    "data.workers=0", "train.epochs=1", "train.batch_size=4", "train.device=cpu", "train.threads=1",
    "train.milestones=[1]", "train.channels_last=false", "train.precision=float32",
]  # fmt: skip


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
        # Of the files that torch opens itself there are about 30; workers share memory by descriptors too.
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
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
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


# Resuming with another recipe


def resumed_with(change: str, *words: str, started: tuple[str, ...] = (CONSTANT,)) -> Callable[[], str]:
    def act() -> str:
        succeeds("train", *TRAIN, *started)
        before = {path: path.read_bytes() for path in Path(RUN).iterdir()}
        told = refused(["train", "--resume", RUN, change], RUN, change.partition("=")[0], "→", *words)
        assert {path: path.read_bytes() for path in Path(RUN).iterdir()} == before
        return told

    return act


def edited_recipe() -> str:
    succeeds("train", *TRAIN, CONSTANT)
    recipe = Path(RUN, "recipe.yaml")
    recipe.write_text(recipe.read_text().replace("train.lr: 0.01", "train.lr: 0.5"))
    return refused(["train", "--resume", RUN], "train.lr: 0.01 → 0.5")


def extended(schedule: str, *more: str) -> Callable[[], str]:
    def act() -> str:
        options = [f"train.schedule={schedule}", *more]
        succeeds("train", *TRAIN, *options)
        succeeds("train", "--resume", RUN, "train.epochs=3")
        succeeds("train", *TRAIN, *options, "train.epochs=3", "--runs", "whole")
        states = [
            load_checkpoint(Path(runs, Path(RUN).name, "last.pt"), remedy="") for runs in ("runs", "whole")
        ]
        assert all(torch.equal(states[0]["student"][k], v) for k, v in states[1]["student"].items())
        return "extended; the same bits as a run of 3 epochs from the start"

    return act


def before_recipes_were_kept() -> str:
    succeeds("train", *TRAIN, CONSTANT)
    path = Path(RUN, "last.pt")
    state = torch.load(path, weights_only=True)
    for name in ("recipe", "data", "teacher", "batches"):
        del state[name]
    torch.save({**state, "format": "fastkd-1"}, path)
    refused(["train", "--resume", RUN, "train.lr=0.5"], "train.lr: 0.01 → 0.5")
    succeeds("train", "--resume", RUN, "train.epochs=2")
    return "another learning rate refused; resumed and extended"


RESUME: list[Row] = [
    (f"`--resume RUN {change}`", must, resumed_with(change, *words))
    for change, must, *words in (
        ("student.width=3", "refused: was → is", "2 → 3"),
        ("train.optimizer=sgd", "refused: was → is", "adamw → sgd"),
        ("train.ema=0.9", "refused: was → is", "not set → 0.9"),
        ("train.lr=0.5", "refused: was → is", "0.01 → 0.5"),
        ("train.schedule=cosine", "refused: was → is", "constant → cosine"),
        ("train.batch_size=8", "refused: was → is", "16 → 8"),
        ("data.synthetic=50", "refused: was → is", "40 → 50"),
        ("method.label_smoothing=0.1", "refused: was → is", "0.0 → 0.1"),
        ("train.seed=1", "refused: was → is", "0 → 1"),
    )
] + [
    (
        "`--resume RUN train.epochs=3` under one_cycle",
        "refused before training, with the reason",
        resumed_with("train.epochs=3", "spread over all epochs", started=("train.schedule=one_cycle",)),
    ),
    (
        "`--resume RUN train.epochs=3` under cosine",
        "refused before training, with the reason",
        resumed_with("train.epochs=3", "spread over all epochs", started=("train.schedule=cosine",)),
    ),
    (
        "`--resume RUN train.epochs=1` of a run of 2",
        "refused: more are trained",
        resumed_with("train.epochs=1", "2 are trained", started=(CONSTANT, "train.epochs=2")),
    ),
    ("`--resume RUN train.epochs=3` under constant", "extended", extended("constant")),
    ("`--resume RUN train.epochs=3` under steps", "extended", extended("steps", "train.milestones=[2]")),
    ("a run's recipe.yaml with another learning rate", "refused: was → is", edited_recipe),
    ("a run from before states kept their recipe", "resumed and extended", before_recipes_were_kept),
]


# Files of a run and of others


def metrics(line: str, *words: str) -> Callable[[], str]:
    def act() -> str:
        Path("run").mkdir()
        Path("run/metrics.jsonl").write_text(line + "\n")
        return refused(["plot", "run"], "run/metrics.jsonl", *words)

    return act


def malformed_summaries() -> str:
    for number, content in enumerate((b"[1]", b'{"method": "cross_entropy"}', b"\xff", b"[" * 100_000)):
        Path(f"runs/other-{number}").mkdir(parents=True)
        Path(f"runs/other-{number}/summary.json").write_bytes(content)
    os.mkfifo("runs/summary.json")
    tree()
    kd = [FILES[0], *FILES[1:], "method=kd", "teacher.name=small_cnn", "teacher.width=2", "teacher.epochs=1"]
    assert "not known" in succeeds("train", *kd)
    return "trained; they are no results to compare with"


def name_with_markup() -> str:
    name = "my [/x] $\\frac$ run"
    succeeds("train", *TRAIN)
    Path(RUN, "run.json").write_text(json.dumps({"name": name}))
    assert name in succeeds("train", f"{RUN}/recipe.yaml")
    assert name in succeeds("train", "--resume", "runs/my-x-frac-run-001", "--eval-only")
    succeeds("plot", RUN, "runs/my-x-frac-run-001")
    return "trained, drawn and printed as written"


def checkpoint(content: Callable[[], Any], *words: str) -> Callable[[], str]:
    def act() -> str:
        tree()
        torch.save(content(), "t.pt")
        kd = ["method=kd", "teacher.name=small_cnn", "teacher.width=2", "teacher.checkpoint=t.pt"]
        told = refused(["train", *FILES, *kd], "t.pt", *words)
        return told.replace(os.getcwd() + "/", "")

    return act


def weights(change: Callable[[dict[Any, Any]], None]) -> Callable[[], Any]:
    def make() -> Any:
        from fastkd.models import build_model

        state = dict(build_model("small_cnn", num_classes=2, width=2, channels=3).state_dict())
        change(state)
        return state

    return make


def sparse(state: dict[Any, Any]) -> None:
    key = next(key for key, value in state.items() if value.dim() == 2)
    state[key] = state[key].to_sparse()


def quantised(state: dict[Any, Any]) -> None:
    key = next(key for key, value in state.items() if value.dim() == 2)
    state[key] = torch.quantize_per_tensor(state[key], 0.1, 0, torch.qint8)


def integers(state: dict[Any, Any]) -> None:
    key = next(key for key, value in state.items() if value.dim() == 2)
    state[key] = state[key].to(torch.int32)


def numbered(state: dict[Any, Any]) -> None:
    state[3] = state.pop(next(iter(state)))


class Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch owned",)


def code_in_a_checkpoint() -> str:
    told = checkpoint(lambda: {"model": Runs()}, "more than tensors")()
    assert not Path("owned").exists()
    return told


def damaged_heads() -> str:
    tree()
    mhkd = [*FILES, "method=mhkd", "method.layers=[stages.0]", "method.head_width=4"]
    mhkd += ["teacher.name=small_cnn", "teacher.width=2", "teacher.epochs=1"]
    succeeds("train", *mhkd)
    shutil.copy(run_folder() / "last.pt", "h.pt")
    succeeds("train", *mhkd, "method.teacher_heads=h.pt")
    content = bytearray(Path("h.pt").read_bytes())
    content[len(content) // 2] ^= 1
    Path("h.pt").write_bytes(content)
    told = refused(["train", *mhkd, "method.teacher_heads=h.pt"], "teacher_heads", "h.pt", "SHA-256")
    Path("h.pt").unlink()
    os.mkfifo("h.pt")
    refused(["train", *mhkd, "method.teacher_heads=h.pt"], "teacher_heads", "h.pt", "FIFO")
    return told.replace(os.getcwd() + "/", "")


def seeds_file() -> str:
    succeeds("train", *TRAIN, "--seeds", "2")
    for content in ('{"count": "many"}', "[]", '{"count": -1}'):
        Path(RUN, "seeds.json").write_text(content)
        told = refused(["train", "--resume", RUN], "seeds.json", "expected a number of seeds")
    return told


def no_run_json() -> str:
    succeeds("train", *TRAIN)
    for content in ("[]", '{"name": 3}', "[" * 100_000):
        Path(RUN, "run.json").write_text(content)
        succeeds("plot", RUN, "--to", f"{len(content)}.png")
        succeeds("train", "--resume", RUN)
    return "named after its folder"


RECORD = {"epoch": 1, "val_accuracy": 0.5, "val_loss": 1.0, "seconds": {"data": 1.0}}
OTHER_FILES: list[Row] = [
    ("metrics.jsonl with a line that is no JSON", "refused by file", metrics("{", "cannot be read")),
    ("metrics.jsonl with a line `[]`", "refused by line and key", metrics("[]", "line 1", "'epoch'")),
    (
        "metrics.jsonl with a text for a number",
        "refused by line and key",
        metrics(json.dumps({**RECORD, "val_loss": "low"}), "line 1", "'val_loss'"),
    ),
    ("other runs' summary.json malformed, or a FIFO", "passed over, no late end", malformed_summaries),
    ("run.json malformed", "the folder's name instead", no_run_json),
    ("seeds.json malformed", "refused by file and value", seeds_file),
    ("a run's name with `[/x]` or `$`", "printed as written", name_with_markup),
    ("sparse weights", "refused by name and kind", checkpoint(weights(sparse), "is sparse")),
    ("quantised weights", "refused by name and kind", checkpoint(weights(quantised), "is quantised (qint8)")),
    ("integer weights", "refused, not converted", checkpoint(weights(integers), "is of int32")),
    ("a state dict with a key 3", "refused", checkpoint(weights(numbered), "holds no state dict")),
    ("method.teacher_heads: a bit is flipped, or a FIFO", "refused by file", damaged_heads),
    ("a checkpoint with code", "refused without torch's advice, not run", code_in_a_checkpoint),
]


# A full disk


@contextlib.contextmanager
def small_disk(folder: str, kilobytes: int) -> Iterator[None]:
    """A file system of so many kilobytes; skips the row where none may be mounted."""
    Path(folder).mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
    if subprocess.run(options, capture_output=True).returncode:
        raise NotTriedError("no file system may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


class NotTriedError(Exception):
    pass


def fill_up(folder: str) -> None:
    with contextlib.suppress(OSError), Path(folder, "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))


def full_glyph_cache() -> str:
    with small_disk("cache", 100):
        environment = {"FASTKD_CACHE": os.path.abspath("cache")}
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            options = ["data.characters=41-5A,61-7A", "train.device=cpu", "train.threads=1"]
            status, text = in_subprocess("train", "glyphs/student", *options)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        assert status == 2, (status, text)
        assert "No space left" in text
        assert not list(Path("cache").iterdir())
    return text.strip().removeprefix("fastkd: error: ").replace(os.getcwd() + "/", "")


def full_at_the_start() -> str:
    with small_disk("runs", 64):
        Path("runs/one").mkdir()
        shutil.copy(Path(__file__), "runs/one/x")
        fill_up("runs")
        return refused(["train", *TRAIN], "No space left on device")


def full_at_the_lock() -> str:
    succeeds("train", *TRAIN)
    with small_disk("full", 512):
        shutil.copytree(RUN, "full/run")
        fill_up("full")
        return refused(["train", "--resume", "full/run"], "full/run", "No space left on device")


def full_for(form: str) -> Callable[[], str]:
    def act() -> str:
        succeeds("train", *TRAIN)
        with small_disk("full", 16):
            fill_up("full")
            told = refused(
                ["export", RUN, "--format", form, "--to", "full/s.pt"], "full/s.pt", "No space left"
            )
            assert [path.name for path in Path("full").iterdir()] == ["filler"]
        return told

    return act


def full_for_a_plot() -> str:
    succeeds("train", *TRAIN)
    with small_disk("full", 16):
        fill_up("full")
        told = refused(["plot", RUN, "--to", "full/c.png"], "full/c.png", "No space left")
        assert [path.name for path in Path("full").iterdir()] == ["filler"]
    return told


@contextlib.contextmanager
def no_room_for(name: str) -> Iterator[None]:
    original = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise OSError(28, "No space left on device")
        original(source, target)

    os.replace = full  # type: ignore[assignment]
    try:
        yield
    finally:
        os.replace = original


def full_for_the_recipe() -> str:
    with no_room_for("recipe.yaml"):
        told = refused(["train", *TRAIN], f"{RUN}/recipe.yaml", "No space left")
    assert not list(Path("runs").iterdir())
    succeeds("train", *TRAIN)
    return told


def full_when_writing(name: str) -> Callable[[], str]:
    """The disk is full when a file of the run folder is written; the run goes on once there is room."""

    def act() -> str:
        with no_room_for(name):
            told = refused(["train", *TRAIN], f"{RUN}/{name}", "No space left", "go on with --resume")
        succeeds("train", "--resume", RUN)
        assert Path(RUN, name).exists()
        return told

    return act


DISK: list[Row] = [
    ("the disk is full when glyphs are rendered", "one line, nothing left behind", full_glyph_cache),
    ("the disk is full when a run folder is made", "one line", full_at_the_start),
    ("the disk is full when a run is resumed", "one line", full_at_the_lock),
    ("the disk is full at `export`", "one line, no half file", full_for("state_dict")),
    ("the same, torch-export", "one line, no half file", full_for("torch-export")),
    ("the disk is full at `plot`", "one line, no half file", full_for_a_plot),
    ("the disk is full when recipe.yaml is written", "one line, no empty folder", full_for_the_recipe),
    *(
        (f"the disk is full when {name} is written", "one line; resumed later", full_when_writing(name))
        for name in ("best.pt", "metrics.jsonl", "summary.json")
    ),
]

ROWS: list[Row] = [*RECIPES, *IMAGES, *RESUME, *OTHER_FILES, *DISK, *OF_MODELS]


def happened(act: Callable[..., str], folder: Path) -> str:
    """What a row's function says, run in ``folder``; a row that hangs raises."""

    def late(*_: object) -> None:
        raise AssertionError(f"still running after {SECONDS} s")

    before = os.getcwd()
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        os.chdir(folder)
        return act(folder) if inspect.signature(act).parameters else act()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        os.chdir(before)


HEAD = """# Bad inputs to the trainer

Each row is tried by `tests/train/test_bad_inputs.py`; the last column is what was seen. This file is written
by `python tests/train/bad_inputs.py > docs/trainer-bad-inputs.md`. Files that are damaged bit by bit, links
and locks are tried by `tests/train/run/test_bit_flips.py` and `tests/files/test_storage.py`.

| input | what must happen | what happened |
|---|---|---|"""


def write_table() -> int:
    print(HEAD)
    failed = 0
    os.environ["FASTKD_CACHE"] = tempfile.mkdtemp()
    for what, must, act in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                seen = happened(act, Path(folder)).replace(f"{folder}/", "")
            except NotTriedError as reason:
                seen = f"not tried: {reason}"
            except Exception as error:
                seen, failed = f"**failed**: {type(error).__name__} {error}"[:300], failed + 1
        cells = (
            " ".join(cell.split()).replace("|", r"\|").replace("<", "&lt;") for cell in (what, must, seen)
        )
        print("|", " | ".join(cells), "|", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(write_table())

"""Encoded images in folders of files or in tar shards, read by sample index."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastkd.errors import DataError
from fastkd.files.mounts import keeps_times
from fastkd.files.regular import open_regular, read_regular
from fastkd.messages import first_line, not_utf8

from .index import Entry, Index, kept_index, part_of, stamp_of
from .shards import expand, samples_of

_READERS = 8  # threads: a cold disk or a network answers several requests at once


class Source(Protocol):
    """Encoded images and their labels ``[N]``; copied to worker processes by pickling or forking."""

    labels: np.ndarray
    num_classes: int
    notes: tuple[str, ...]

    @property
    def classes(self) -> list[str] | None: ...  # their names

    def read(self, index: int) -> bytes: ...

    def name(self, index: int) -> str: ...

    def digest(self) -> str:
        """Identifies the content by names and labels, in shards also by sizes; pixels are not read."""


class FolderSource:
    """``ROOT/CLASS/*.jpeg``, classes in alphabetical order and images as in torchvision's ``ImageFolder``.

    Hidden folders and files (``.ipynb_checkpoints``, macOS's ``._NAME``) are ignored.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        try:
            self._index, problem = kept_index(
                functools.partial(_scan, root), "folders", os.path.abspath(root)
            )
            hidden = sorted(e.name for e in os.scandir(root) if _hidden(e.name) and e.is_dir())
        except OSError as error:
            raise DataError(
                f"data.root: {root} must hold one folder of images per class: {first_line(error)}"
            ) from None
        of_folders = [path.partition(os.sep)[0] for path in self._index.paths]  # in the order of classes
        self.classes = list(dict.fromkeys(of_folders))
        self.num_classes = len(self.classes)
        # Before a network is trained that nothing can describe.
        if (name := not_utf8(self.classes)) is not None:
            raise DataError(
                f"data.root: the class folder {os.fsencode(name)!r} of {root} has a name that is not UTF-8, "
                "which the files of an export need; rename it"
            )
        number = {name: label for label, name in enumerate(self.classes)}
        self.labels = np.repeat([number[name] for name in of_folders], self._index.counts)
        seen = np.bincount(self.labels, minlength=self.num_classes)
        if empty := [name for name, count in zip(self.classes, seen, strict=True) if not count]:
            raise DataError(
                f"data.root: {root} must hold one folder of images per class: Found no valid file for the "
                f"classes {', '.join(empty)}."
            )
        ignored = f"{root}: hidden folders are ignored: {', '.join(hidden)}" if hidden else None
        self.notes: tuple[str, ...] = tuple(note for note in (ignored, problem) if note)

    def read(self, index: int) -> bytes:
        return read_regular(Path(self.name(index)))

    def name(self, index: int) -> str:
        folder = self._index.paths[self._index.place(index)]
        return os.path.join(self._root, folder, self._index.name(index))

    def digest(self) -> str:
        paths: list[bytes] = []
        for number, path in enumerate(self._index.paths):
            folder = os.fsencode(os.path.join(path, ""))
            paths += [folder + name for name in self._index.names_of(number)]
        return _digest(self.classes, np.array(paths), self.labels)


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _scan(root: Path, before: Index | None) -> Index:
    """The visible folders below ``root`` and the images in them, in torchvision's order.

    Unchanged folders are those of ``before``. Where a folder does not keep the time of its last change, all
    are listed.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    suffixes = tuple(IMG_EXTENSIONS)
    if before is not None and not keeps_times(root):
        before = None
    inside: dict[str, list[str]] = {}
    for path in before.paths if before else ():
        inside.setdefault(os.path.dirname(path), []).append(path)

    def visit(path: str) -> tuple[Entry, list[str]]:
        """A folder's entry, and the folders in it."""
        full = os.path.join(root, path)
        stamp = stamp_of(os.stat(full))  # before it is listed: what changes after it shows at the next start
        part = before.unchanged(path, stamp) if before else None
        if part is not None:
            return Entry(path, stamp, part), inside.get(path, [])
        folders, images = [], []
        with os.scandir(full) as found:
            for entry in found:
                if _hidden(entry.name):
                    continue
                if entry.is_dir():
                    folders.append(os.path.join(path, entry.name))
                elif entry.name.lower().endswith(suffixes):
                    images.append(entry.name)
        return Entry(path, stamp, part_of(sorted(images))), folders

    entries = []
    classes = sorted(e.name for e in os.scandir(root) if e.is_dir() and not _hidden(e.name))
    for name in classes:
        of_class, waiting = [], [name]
        while waiting:
            entry, folders = visit(waiting.pop())
            of_class.append(entry)
            waiting += folders
        entries += sorted(of_class, key=lambda entry: entry.path)
    if not entries:
        raise FileNotFoundError(f"Couldn't find any class folder in {root}.")
    return Index.of(entries)


class ShardSource:
    """Samples of tar shards in the WebDataset format, found by one pass over the tar headers.

    The webdataset library expands the pattern and groups files into samples. Samples are read by offset, not
    as a stream, so that an epoch can be shuffled as a whole, divided exactly over ranks and resumed at any
    step. Shards are files on a local or mounted file system.
    """

    classes: None = None  # shards have labels without names

    def __init__(self, root: Path, pattern: str, classes: int | None = None) -> None:
        self.shards = expand(root, pattern)

        def scan(before: Index | None) -> Index:
            def entry_of(shard: Path) -> Entry:
                try:
                    stamp = stamp_of(os.stat(shard))
                except OSError as error:
                    raise DataError(f"the shard {shard} cannot be read: {error.strerror or error}") from None
                part = before.unchanged(str(shard), stamp) if before else None
                return Entry(str(shard), stamp, part or samples_of(shard))

            with ThreadPoolExecutor(_READERS) as pool:
                return Index.of(list(pool.map(entry_of, self.shards)))

        self._index, problem = kept_index(scan, "shards", os.path.abspath(root), pattern)
        if not len(self._index):
            raise DataError(f"the shards {pattern} of {root} hold no sample with an image and a .cls")
        self.labels = self._index.numbers[:, 2].copy()
        self.num_classes = int(self.labels.max()) + 1 if classes is None else classes
        if self.num_classes <= self.labels.max():
            largest = int(self.labels.max())
            raise DataError(f"data.classes = {classes}, but the shards {pattern} have a label {largest}")
        self.notes: tuple[str, ...] = tuple(note for note in (self._left_out(), problem) if note)
        self._files: dict[int, int] = {}  # descriptors of open shards, least recently used first

    def read(self, index: int) -> bytes:
        shard = self._index.place(index)
        file = self._files.pop(shard, None)
        if file is None:
            # In random order a worker soon reads every shard; there may be more of them than it may open.
            while len(self._files) >= _open_files():
                os.close(self._files.pop(next(iter(self._files))))
            file = self._opened(shard)
        self._files[shard] = file
        offset, size = self._index.numbers[index, :2].tolist()
        # pread needs no file position, which forked workers would share.
        return os.pread(file, size, offset)

    def _left_out(self) -> str | None:
        found = self._index.left_out
        shard = next((number for number, part in enumerate(found) if part.samples), None)
        if shard is None:
            return None
        return (
            f"{self.shards[shard]}: samples without an image and a .cls side by side are ignored: the first "
            f"is {found[shard].first}, of {sum(part.samples for part in found):,} in {len(found):,} shards"
        )

    def _opened(self, shard: int) -> int:
        file = open_regular(self.shards[shard])
        modified, _, size, _ = stamp_of(os.fstat(file))
        if (modified, size) != (self._index.stamps[shard, 0], self._index.stamps[shard, 2]):
            os.close(file)
            raise OSError(errno.ESTALE, "the shard was replaced while it is in use; continue with --resume")
        return file

    def close(self) -> None:
        """Close the shards; reading reopens them."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at interpreter exit, or if __init__ failed
            self.close()

    def name(self, index: int) -> str:
        return f"{self.shards[self._index.place(index)]}, sample {self._index.name(index)}"

    def digest(self) -> str:
        keys = [key for number in range(len(self.shards)) for key in self._index.names_of(number)]
        sizes = self._index.numbers[:, 1]
        return _digest([shard.name for shard in self.shards], np.array(keys), sizes, self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}


def _open_files() -> int:
    """How many shards a process keeps open: at most 256, and a quarter of the files that it may open."""
    try:
        import resource
    except ImportError:  # Windows
        return 64
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 256 if soft == resource.RLIM_INFINITY else max(1, min(256, soft // 4))


def _digest(names: Sequence[str], *arrays: np.ndarray) -> str:
    digest = hashlib.sha256(os.fsencode("\n".join(names)))
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()

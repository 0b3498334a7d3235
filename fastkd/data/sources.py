"""Encoded images in folders of files or in tar shards, read by sample index."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastkd.errors import DataError
from fastkd.files.regular import open_regular, read_regular

_MOST_SHARDS = 1_000_000
LARGEST_LABEL = 2**24 - 1  # a network has one output per label up to the largest
SUFFIXES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp")  # of images in shards


class Source(Protocol):
    """Encoded images and their labels ``[N]``; copied to worker processes by pickling or forking."""

    labels: np.ndarray
    num_classes: int

    @property
    def classes(self) -> list[str] | None: ...  # their names

    def read(self, index: int) -> bytes: ...

    def name(self, index: int) -> str: ...

    def digest(self) -> str:
        """Identifies the content by names, sizes and labels; pixels are not read."""


class FolderSource:
    """``ROOT/CLASS/*.jpeg``, classes in alphabetical order as in torchvision's ``ImageFolder``.

    Hidden folders and files (``.ipynb_checkpoints``, macOS's ``._NAME``) are ignored.
    """

    def __init__(self, root: Path) -> None:
        try:
            found = _visible_folder(root)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"data.root: {root} must hold one folder of images per class: {reason}") from None
        hidden = sorted(path.name for path in root.iterdir() if path.is_dir() and _hidden(path.name))
        self.notes = (f"{root}: hidden folders are ignored: {', '.join(hidden)}",) if hidden else ()
        self.classes: list[str] = found.classes
        self.num_classes = len(found.classes)
        self._root = root
        # Bytes, not a list of strings: reference counts would make forked workers copy the list.
        self._paths = np.array([os.fsencode(os.path.relpath(path, root)) for path, _ in found.samples])
        self.labels = np.array([label for _, label in found.samples], np.int64)

    def read(self, index: int) -> bytes:
        return read_regular(Path(self.name(index)))

    def name(self, index: int) -> str:
        return str(self._root / os.fsdecode(self._paths[index]))

    def digest(self) -> str:
        return _digest(self.classes, self._paths, self.labels)


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _visible_folder(root: Path) -> Any:
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

    class Visible(ImageFolder):
        def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
            names = sorted(e.name for e in os.scandir(directory) if e.is_dir() and not _hidden(e.name))
            if not names:
                raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
            return names, {name: number for number, name in enumerate(names)}

    def visible(path: str) -> bool:  # checks folders below a class too
        inside = os.path.relpath(path, root).split(os.sep)
        return has_file_allowed_extension(path, IMG_EXTENSIONS) and not any(map(_hidden, inside))

    return Visible(str(root), is_valid_file=visible)


class ShardSource:
    """Samples of tar shards in the WebDataset format, found by one pass over the tar headers.

    The webdataset library expands the pattern and groups files into samples. Samples are read by offset, not
    as a stream, so that an epoch can be shuffled as a whole, divided exactly over ranks and resumed at any
    step. Shards are files on a local or mounted file system.
    """

    classes: None = None  # shards have labels without names

    def __init__(self, root: Path, pattern: str, classes: int | None = None) -> None:
        self.shards = _expand(root, pattern)
        rows: list[tuple[int, int, int, int]] = []
        keys: list[str] = []
        for number, shard in enumerate(self.shards):
            for key, place, size, label in _samples_of(shard):
                rows.append((number, place, size, label))
                keys.append(key)
        if not rows:
            raise DataError(f"the shards {pattern} of {root} hold no sample with an image and a .cls")
        table = np.array(rows, np.int64)
        self._shard, self._offset, self._size = (table[:, column].copy() for column in range(3))
        self.labels = table[:, 3].copy()
        self._keys = np.array([key.encode() for key in keys])
        self.num_classes = int(self.labels.max()) + 1 if classes is None else classes
        if self.num_classes <= self.labels.max():
            largest = int(self.labels.max())
            raise DataError(f"data.classes = {classes}, but the shards {pattern} have a label {largest}")
        self._files: dict[int, int] = {}  # descriptors of open shards, least recently used first

    def read(self, index: int) -> bytes:
        shard = int(self._shard[index])
        file = self._files.pop(shard, None)
        if file is None:
            # In random order a worker soon reads every shard; there may be more of them than it may open.
            while len(self._files) >= _open_files():
                os.close(self._files.pop(next(iter(self._files))))
            file = open_regular(self.shards[shard])
        self._files[shard] = file
        # pread needs no file position, which forked workers would share.
        return os.pread(file, int(self._size[index]), int(self._offset[index]))

    def close(self) -> None:
        """Close the shards; reading reopens them."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at interpreter exit, or if __init__ failed
            self.close()

    def name(self, index: int) -> str:
        return f"{self.shards[int(self._shard[index])]}, sample {self._keys[index].decode()}"

    def digest(self) -> str:
        return _digest([shard.name for shard in self.shards], self._keys, self._size, self.labels)

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


def _expand(root: Path, pattern: str) -> list[Path]:
    webdataset = _webdataset()
    ranges = re.findall(r"\{(\d+)\.\.(\d+)", pattern)
    names_of_it = math.prod(
        [abs(int(last) - int(first)) + 1 for first, last in ranges]
        + [part.count(",") + 1 for part in re.findall(r"\{([^{}]*,[^{}]*)\}", pattern)]
    )
    if len(pattern) > 4096 or names_of_it > _MOST_SHARDS:
        raise DataError(
            f"the shard pattern {pattern[:80]!r} expands to {names_of_it:,} names; expected at most "
            f"{_MOST_SHARDS:,}"
        )
    try:
        names = webdataset.shardlists.expand_urls(pattern)
    except Exception as error:  # braceexpand raises types of its own
        raise DataError(f"the shard pattern {pattern!r} cannot be expanded: {error}") from None
    shards: list[Path] = []
    for name in names:
        base, relative = root, name
        if Path(name).is_absolute():
            base, relative = Path(Path(name).anchor), str(Path(name).relative_to(Path(name).anchor))
        try:
            found = sorted(base.glob(relative)) if any(sign in name for sign in "*?[") else [root / name]
        except (ValueError, NotImplementedError) as error:
            raise DataError(f"the shard pattern {pattern!r} cannot be expanded: {error}") from None
        if not found or not all(path.is_file() for path in found):
            raise DataError(f"data.root: {root} has no shard {name}")
        shards += found
    return shards


def _samples_of(shard: Path) -> Iterator[tuple[str, int, int, int]]:
    """Key, offset and size of the image, and label, for each sample with an image and a label."""
    webdataset = _webdataset()
    end = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as archive, shard.open("rb") as content:

            def members() -> Iterator[dict[str, Any]]:
                for member in archive:
                    if member.isreg():
                        place = (member.offset_data, member.size)
                        yield {"fname": member.name, "data": place, "__url__": str(shard)}

            for sample in webdataset.tariterators.group_by_keys(members()):
                image = next((sample[suffix] for suffix in SUFFIXES if suffix in sample), None)
                if image is None or "cls" not in sample:
                    continue
                if sum(image) > end or sum(sample["cls"]) > end:
                    raise DataError(f"the shard {shard} is truncated at sample {sample['__key__']}")
                content.seek(sample["cls"][0])
                text = content.read(sample["cls"][1])
                if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", text) or int(text) > LARGEST_LABEL:
                    raise DataError(
                        f"the shard {shard}: {sample['__key__']}.cls is {text[:20]!r}; "
                        f"expected a number from 0 to {LARGEST_LABEL}"
                    )
                yield sample["__key__"], *image, int(text)
    except DataError:
        raise
    except Exception as error:  # tarfile raises many types for damaged headers
        raise DataError(f"the shard {shard} cannot be read: {error}") from None


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError:
        raise DataError(
            "data.name = webdataset needs the webdataset library, which is not installed: "
            'pip install "fastkd[webdataset]"'
        ) from None
    return webdataset


def _digest(names: Sequence[str], *arrays: np.ndarray) -> str:
    digest = hashlib.sha256("\n".join(names).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()

"""The index of a large data set: its samples' names and places, kept between starts, checked at each.

It is kept outside the data set, which may be read-only: ``index-*.npz`` in the cache folder, sealed by its
SHA-256. A part (a folder of images, a tar shard) is taken from there only if its times, size and inode are
those of the scan; any other part is scanned again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fastkd.errors import StorageError
from fastkd.files.atomic import make_folder, remove_leftovers, write_atomically
from fastkd.files.cache import cache_folder
from fastkd.files.regular import open_regular
from fastkd.files.sealed import is_whole, seal

_FORMAT = 1
WORTH_KEEPING = 20_000  # samples; fewer are found again in less than a second
# A change within the same tick of the file system's clock as the one before does not show. FAT's are 2 s.
_TICK = 2 * 10**9

Stamp = tuple[int, int, int, int]


def stamp_of(status: os.stat_result) -> Stamp:
    """Times of modification and change in ns, size, inode (63 bits of it)."""
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino & (2**63 - 1)


class LeftOut(NamedTuple):
    """What a scan did not take: samples that lack a file."""

    samples: int = 0
    first: str = ""


class Part(NamedTuple):
    """The samples of a folder or shard, in order."""

    names: bytes  # one after the other
    lengths: np.ndarray  # of the names, uint32 [n]
    numbers: np.ndarray  # int64 [n, k]: what is known of a sample beside its name
    left_out: LeftOut = LeftOut()


def part_of(names: Iterable[str], numbers: np.ndarray | None = None, left_out: LeftOut | None = None) -> Part:
    encoded = [os.fsencode(name) for name in names]
    lengths = np.fromiter(map(len, encoded), np.uint32, len(encoded))
    none = np.empty((len(encoded), 0), np.int64)
    return Part(b"".join(encoded), lengths, none if numbers is None else numbers, left_out or LeftOut())


class Entry(NamedTuple):
    path: str  # unique in an index
    stamp: Stamp
    part: Part


class Index:
    """The samples of all parts, numbered in order.

    In arrays, which forked workers share: a list of strings would be copied into every worker, page by page,
    as reference counts are written.
    """

    def __init__(
        self,
        paths: list[str],
        stamps: np.ndarray,
        counts: np.ndarray,
        whole: Part,
        left_out: Sequence[LeftOut],
    ) -> None:
        self.paths, self.stamps, self.counts, self.left_out = paths, stamps, counts, left_out
        self.names = np.frombuffer(whole.names, np.uint8)
        self.lengths, self.numbers = whole.lengths, whole.numbers
        self._first, self._begin = _starts(counts), _starts(whole.lengths)
        self._number = {path: number for number, path in enumerate(paths)}

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Index:
        parts = [entry.part for entry in entries]
        return cls(
            [entry.path for entry in entries],
            np.array([entry.stamp for entry in entries], np.int64).reshape(len(entries), 4),
            np.array([len(part.lengths) for part in parts], np.int64),
            Part(
                b"".join(part.names for part in parts),
                np.concatenate([part.lengths for part in parts]),
                np.concatenate([part.numbers for part in parts]),
            ),
            [part.left_out for part in parts],
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def place(self, sample: int) -> int:
        """The number of the part that a sample is in."""
        return int(np.searchsorted(self._first, sample, side="right")) - 1

    def name(self, sample: int) -> str:
        return os.fsdecode(self.names[self._begin[sample] : self._begin[sample + 1]].tobytes())

    def names_of(self, number: int) -> list[bytes]:
        """The names in one part."""
        samples = slice(self._first[number], self._first[number + 1] + 1)
        begins = self._begin[samples] - self._begin[samples.start]
        names = self.part(number).names
        return [names[a:b] for a, b in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True)]

    def part(self, number: int) -> Part:
        samples = slice(self._first[number], self._first[number + 1])
        names = self.names[self._begin[samples.start] : self._begin[samples.stop]].tobytes()
        return Part(names, self.lengths[samples], self.numbers[samples], self.left_out[number])

    def unchanged(self, path: str, stamp: Stamp) -> Part | None:
        """The part as it was scanned, if its stamp is still the same."""
        number = self._number.get(path)
        return self.part(number) if number is not None and tuple(self.stamps[number]) == stamp else None

    def same_as(self, other: Index | None) -> bool:
        return other is not None and self.paths == other.paths and np.array_equal(self.stamps, other.stamps)


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def kept_index(scan: Callable[[Index | None], Index], *key: str) -> tuple[Index, str | None]:
    """``scan(before)``, with the index of an earlier start or None; kept for the next start if it is large.

    ``key`` says what of. The second value is what prevented keeping it; the index can be used all the same.
    """
    kept = _Kept(os.fsencode("\n".join([f"fastkd index {_FORMAT}", *key])))
    before = kept.read()
    index = scan(before)
    return index, kept.write(index, before)


class _Kept:
    """The file of an index."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._begun = time.time_ns()
        self.path = cache_folder() / f"index-{hashlib.sha256(key).hexdigest()[:12]}.npz"

    def read(self) -> Index | None:
        """None if there is none, if it is damaged, or of something else."""
        try:
            with open(open_regular(self.path), "rb") as file:
                if not is_whole(file):
                    return None
                file.seek(0)
                with np.load(file, allow_pickle=False) as arrays:
                    if arrays["key"].tobytes() != self._key:
                        return None
                    paths = os.fsdecode(arrays["paths"].tobytes()).split("\0")
                    whole = Part(arrays["names"].tobytes(), arrays["lengths"], arrays["numbers"])
                    # Written by a version that did not count them: none are known until the next scan.
                    left_out = json.loads(arrays["left_out"].tobytes()) if "left_out" in arrays else None
                    known = [LeftOut(*each) for each in left_out or [()] * len(paths)]
                    return Index(paths, arrays["stamps"], arrays["counts"], whole, known)
        except OSError:
            return None

    def write(self, index: Index, before: Index | None) -> str | None:
        """Write ``index`` if it is large and differs from ``before``; returns what prevented it."""
        if len(index) < WORTH_KEEPING or index.same_as(before):
            return None
        stamps = index.stamps.copy()
        stamps[stamps[:, :2].max(1) > self._begun - _TICK] = 0  # equal to none: scanned again next time
        buffer = io.BytesIO()
        np.savez(
            buffer,
            key=np.frombuffer(self._key, np.uint8),
            paths=np.frombuffer(os.fsencode("\0".join(index.paths)), np.uint8),
            stamps=stamps,
            counts=index.counts,
            names=index.names,
            lengths=index.lengths,
            numbers=index.numbers,
            left_out=np.frombuffer(json.dumps(index.left_out).encode(), np.uint8),
        )
        seal(buffer)
        try:
            make_folder(self.path.parent)
            remove_leftovers(self.path.parent)
            write_atomically(self.path, lambda path: path.write_bytes(buffer.getbuffer()))
        except StorageError as error:
            return f"every start finds the {len(index):,} images anew: {error} (FASTKD_CACHE)"
        return None

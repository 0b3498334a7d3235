"""A cache of a teacher's logits, used in place of the teacher: one memory-mapped file per epoch.

cache.json        what was cached: data, augmentation, teacher, format
epoch-0000.npy    one record per training image, in the order of the data set; after the array, where NumPy
                  does not read, the SHA-256 of the bytes before

A record has the teacher's log-probabilities in float16, of all classes or of the ``top_k`` most probable
ones with their indices; the log of the total probability of the other classes; and the logsumexp of the
logits, which converts log-probabilities back to logits. float16 is most precise near 0, that is for the most
probable classes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from fastkd.data.data import CacheableData, Data
from fastkd.data.order import IndexedLoader
from fastkd.errors import CheckpointError, TrainError
from fastkd.files.atomic import make_folder, take_room, write_atomically
from fastkd.files.regular import open_regular, read_regular
from fastkd.files.sealed import append_digest, digest_of, has_digest, is_whole, short_digest_of
from fastkd.messages import one_line
from fastkd.recipe.schema import Recipe, Teacher

FORMAT = "fastkd-teacher-cache-2"
_WITHOUT_DIGESTS = "fastkd-teacher-cache-1"  # written by older versions
_FACTS = "cache.json"
_LEAST = -6e4  # the least float16 is -65504


class CacheError(TrainError):
    """A cache of teacher logits is missing, damaged or made for another recipe, or its folder exists."""


def record_type(num_classes: int, top_k: int | None) -> np.dtype[Any]:
    """The NumPy type of one sample; ``top_k`` None keeps all classes."""
    fields: list[tuple[Any, ...]] = [
        ("logsumexp", "<f4"),
        ("log_probs", "<f2", top_k or num_classes),
    ]
    if top_k is not None:
        fields += [("classes", "<u2" if num_classes <= 2**16 else "<u4", top_k), ("log_rest", "<f4")]
    return np.dtype(fields)


def pack(logits: Tensor, top_k: int | None) -> np.ndarray:
    """Records ``[N]`` of logits ``[N, C]``."""
    logits = logits.detach().float()
    records = np.empty(len(logits), record_type(logits.shape[1], top_k))
    log_probs = logits.log_softmax(1)
    records["logsumexp"] = logits.logsumexp(1).cpu().numpy()
    if top_k is not None:
        # The rest is summed directly: 1 - sum(top) would cancel.
        kept, classes = log_probs.topk(top_k, dim=1)
        rest = log_probs.scatter(1, classes, -torch.inf).logsumexp(1)
        records["classes"] = classes.cpu().numpy()
        records["log_rest"] = rest.cpu().numpy()
        log_probs = kept
    records["log_probs"] = log_probs.clamp(min=_LEAST).cpu().numpy()
    return records


def unpack(records: np.ndarray, num_classes: int, device: torch.device) -> Tensor:
    """Logits ``[N, C]`` in float32. With top-k the other classes get equal shares of their probability."""

    def part(name: str) -> Tensor:
        # Copied, since torch refuses the strides of a field, even for one row.
        return torch.from_numpy(records[name].copy()).to(device, non_blocking=True)

    log_probs = part("log_probs").float()
    if "classes" in (records.dtype.names or ()):
        classes = torch.from_numpy(records["classes"].astype(np.int64)).to(device, non_blocking=True)
        others = max(num_classes - classes.shape[1], 1)
        each = part("log_rest") - float(np.log(others))
        whole = each[:, None].expand(-1, num_classes).clamp(min=_LEAST)
        log_probs = whole.scatter(1, classes, log_probs)
    return log_probs + part("logsumexp")[:, None]


def wanted_facts(recipe: Recipe, data: Data) -> dict[str, Any]:
    """The facts of a cache for this recipe. Raises ``CacheError`` if the recipe cannot be cached."""
    if recipe.teacher is None or not isinstance(data, CacheableData):
        lacks = "it has no teacher" if recipe.teacher is None else "its images are augmented in whole batches"
        raise CacheError(f"teacher logits cannot be cached for this recipe: {lacks}")
    mixed = bool(data.augmentation["mixup"] or data.augmentation["cutmix"])
    return {
        "data": short_digest_of(data.content),
        "samples": data.samples,
        "classes": data.num_classes,
        "augmentation": dict(data.augmentation),
        "seed": recipe.train.seed if data.varies else None,
        "batch_size": recipe.train.batch_size if mixed else None,  # decides which images are mixed
        "teacher": _teacher_facts(recipe.teacher),
        "epochs": recipe.train.epochs if data.varies else 1,
    }


def _teacher_facts(teacher: Teacher) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": teacher.name, "width": teacher.width}
    if teacher.weights is not None:
        return facts | {"weights": teacher.weights.rpartition(".")[2]}
    if teacher.checkpoint is None:
        return facts | {
            "trained": short_digest_of(teacher.model_dump(exclude={"checkpoint", "weights", "cache"}))
        }
    try:
        content = read_regular(Path(teacher.checkpoint))
        return facts | {"sha256": hashlib.sha256(content).hexdigest()}
    except OSError as error:
        raise CheckpointError(f"teacher.checkpoint = {teacher.checkpoint} cannot be read: {error}") from None


class CachedTeacher(nn.Module):
    """Placeholder for a teacher whose logits come with the batch."""

    def forward(self, inputs: Tensor) -> Tensor:
        raise RuntimeError("the teacher's logits are cached: they come as the third entry of a batch")


class TeacherCache:
    """A finished cache, opened for reading. Raises ``CacheError``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.facts = read_facts(folder / _FACTS)
            self._classes, self._samples = int(self.facts["classes"]), int(self.facts["samples"])
            self._epochs = int(self.facts["epochs"])
            expected = record_type(self._classes, self.facts["top_k"])
            if self._epochs < 1 or not isinstance(self.facts.get("val_accuracy", 0.0), float | int):
                raise ValueError(f"{_FACTS} is damaged")
            for epoch in range(self._epochs):
                os.close(open_regular(folder / shard_name(epoch)))
            # Memory-mapped, and never unpickled.
            self._shards = [
                np.load(folder / shard_name(epoch), mmap_mode="r", allow_pickle=False)
                for epoch in range(self._epochs)
            ]
        except Exception as error:  # NumPy raises many types for damaged headers
            raise CacheError(
                f"teacher.cache: {folder} is not a complete cache of teacher logits: {one_line(error)}"
            ) from None
        for epoch, shard in enumerate(self._shards):
            if shard.dtype != expected or shard.shape != (self._samples,):
                raise CacheError(f"teacher.cache: {folder / shard_name(epoch)} does not match {_FACTS}")
            # Finds truncated files at once, not only when their epoch begins.
            if self.facts["format"] == FORMAT and not _shard_has(has_digest, folder / shard_name(epoch)):
                raise CacheError(
                    f"teacher.cache: {folder} is not a complete cache of teacher logits: {shard_name(epoch)} "
                    "is truncated"
                )
        self._checked: set[int] = set()

    def _check(self, epoch: int) -> None:
        """Raise ``CacheError`` if an epoch's file is damaged; called once per epoch, before its first use."""
        path = self.folder / shard_name(epoch)
        if self.facts["format"] != _WITHOUT_DIGESTS and not _shard_has(is_whole, path):
            raise CacheError(
                f"teacher.cache: {path} is damaged: its SHA-256 does not match. To rebuild it, delete it, "
                f"rename the folder to {self.folder.name}.partial, and run the same `fastkd cache-teacher`"
            )
        if "classes" in (self._shards[epoch].dtype.names or ()):
            largest = int(self._shards[epoch]["classes"].max(initial=0))
            if largest >= self._classes:
                raise CacheError(
                    f"teacher.cache: {path} has a class {largest}, expected 0 to {self._classes - 1}"
                )
        self._checked.add(epoch)

    @property
    def bytes_per_sample(self) -> int:
        return self._shards[0].dtype.itemsize

    def logits(self, epoch: int, indices: Tensor, device: torch.device) -> Tensor:
        """The teacher's logits ``[N, C]`` for training images in an epoch, counting from 0."""
        epoch %= self._epochs  # without randomness one epoch is cached
        if epoch not in self._checked:
            self._check(epoch)
        shard = self._shards[epoch]
        records = shard[indices.numpy()]
        absent = (records["logsumexp"] == 0) & (records["log_probs"] == 0).all(1)
        if absent.any():
            first = int(indices[int(absent.argmax())])
            raise CacheError(
                f"teacher.cache: {self.folder} lacks training image {first} in epoch {epoch + 1}: "
                "it could not be read when the cache was made"
            )
        return unpack(records, self._classes, device)

    def check_fits(self, wanted: dict[str, Any]) -> None:
        """Raise ``CacheError`` that names every difference from the facts that a recipe needs."""
        differ = [
            f"{name}: {self.facts.get(name)!r} in the cache, {value!r} in the recipe"
            for name, value in wanted.items()
            if name != "epochs" and self.facts.get(name) != value
        ]
        if self._epochs < wanted["epochs"]:
            differ.append(f"epochs: {self._epochs} in the cache, {wanted['epochs']} in the recipe")
        if differ:
            raise CacheError(
                f"teacher.cache: {self.folder} does not fit this recipe: {'; '.join(differ)}; "
                "create a cache for it with `fastkd cache-teacher`"
            )


class CachedLoader:
    """Yields ``(images, target, teacher_logits)`` from a loader and the cache that was made with it."""

    def __init__(self, loader: IndexedLoader, cache: TeacherCache) -> None:
        self._loader, self._cache, self._epoch = loader, cache, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._loader.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return self.batches()

    def batches(
        self, start: int = 0, rank: int = 0, world: int = 1, even: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for images, target, indices in self._loader.indexed(start, rank, world, even):
            yield images, target, self._cache.logits(self._epoch, indices, images.device)


class CacheWriter:
    """Writes a cache epoch by epoch into ``FOLDER.partial``, which is renamed when it is complete.

    A partial cache with the same facts is resumed after its last complete epoch. Raises ``CacheError`` if
    ``folder`` exists, or if the partial cache has other facts.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        if folder.exists():
            raise CacheError(f"{folder} already exists; a cache is never overwritten: choose another folder")
        self._folder = folder
        self.partial = folder.with_name(folder.name + ".partial")
        self._facts = {"format": FORMAT, **facts}
        make_folder(self.partial)
        path = self.partial / _FACTS
        if path.exists():
            try:
                begun = read_facts(path)
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise CacheError(f"{path} cannot be read: {error}; delete {self.partial}") from None
            if begun["format"] == _WITHOUT_DIGESTS:
                self._facts["format"] = _WITHOUT_DIGESTS
            if begun != json.loads(json.dumps(self._facts)):
                raise CacheError(f"{self.partial} was started for another recipe; choose another folder")
        else:
            sealed = {**self._facts, "sha256": digest_of(self._facts)}
            text = json.dumps(sealed, indent=2) + "\n"
            write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def missing_epochs(self) -> list[int]:
        return [e for e in range(self._facts["epochs"]) if not (self.partial / shard_name(e)).exists()]

    def write_epoch(self, epoch: int, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Write an epoch of (sample indices, logits); records of missing images stay zero."""
        kind = record_type(self._facts["classes"], self._facts["top_k"])

        def write(temporary: Path) -> None:
            shard = np.lib.format.open_memmap(
                temporary, mode="w+", dtype=kind, shape=(self._facts["samples"],)
            )
            try:
                take_room(temporary)
            except OSError as error:
                size = temporary.stat().st_size / 1e6
                name = self.partial / shard_name(epoch)
                raise CacheError(f"no space for {name} of {size:.0f} MB: {error.strerror}") from None
            for indices, logits in batches:
                if not bool(logits.isfinite().all()):
                    raise CacheError(f"the teacher's logits are not finite in epoch {epoch + 1}")
                shard[indices.numpy()] = pack(logits, self._facts["top_k"])
            shard.flush()
            with temporary.open("r+b") as file:
                append_digest(file)

        write_atomically(self.partial / shard_name(epoch), write)

    def finish(self) -> TeacherCache:
        try:
            os.rename(self.partial, self._folder)
        except OSError as error:
            raise CacheError(
                f"{self.partial} is complete, but cannot be renamed to {self._folder}: {error}"
            ) from None
        return TeacherCache(self._folder)


def read_facts(path: Path) -> dict[str, Any]:
    """Read cache.json. Raises ``OSError``, and ``ValueError`` or ``KeyError`` if it is damaged."""
    facts: dict[str, Any] = json.loads(read_regular(path))
    if facts["format"] not in (FORMAT, _WITHOUT_DIGESTS):
        raise ValueError(f"its format is {facts['format']!r}, expected {FORMAT!r}")
    if facts["format"] == FORMAT and facts.pop("sha256", None) != digest_of(facts):
        raise ValueError(f"{_FACTS} is damaged: its SHA-256 does not match")
    return facts


def _shard_has(look: Callable[[BinaryIO], bool], path: Path) -> bool:
    with path.open("rb") as file:
        return look(file)


def shard_name(epoch: int) -> str:
    return f"epoch-{epoch:04d}.npy"

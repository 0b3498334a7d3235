"""A cache of a teacher, used in place of it: one memory-mapped file per epoch.

cache.json        what was cached: data, augmentation, teacher, store, format
head.pt           of the store "features": the teacher's last linear layer
epoch-0000.npy    one record per training image, in the order of the data set; after the array, where NumPy
                  does not read, the SHA-256 of the bytes before

The records are those of a store: see ``cache_stores``.
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
from torch import Tensor

from fastkd.data.data import Data
from fastkd.data.order import IndexedLoader, with_rows
from fastkd.distill import GivenFeatures, GivenTeacher, find_method
from fastkd.errors import CheckpointError, RecipeError
from fastkd.files.atomic import make_folder, take_room, write_atomically
from fastkd.files.regular import open_regular, read_regular
from fastkd.files.sealed import append_digest, digest_of, has_digest, is_whole, short_digest_of
from fastkd.messages import one_line
from fastkd.recipe.sections import Recipe, Teacher

from .cache_stores import CacheError, FeaturesStore, Store, stored_as
from .checkpoint import load_checkpoint, save_checkpoint

FORMAT = "fastkd-teacher-cache-3"
_BEFORE = ("fastkd-teacher-cache-1", "fastkd-teacher-cache-2")  # with other records
_FACTS, _HEAD = "cache.json", "head.pt"


def wanted_facts(recipe: Recipe, data: Data, device: torch.device) -> dict[str, Any]:
    """The facts of a cache for this recipe, without those of its store. Raises ``CacheError``."""
    if recipe.teacher is None:
        raise CacheError("a teacher cannot be cached for this recipe: it has none")
    if find_method(recipe.method).reads_layers(recipe.options):
        raise CacheError(
            f"method {recipe.method} needs the teacher's layers, which no cache has: train with the teacher"
        )
    return {
        "data": short_digest_of(data.content),
        "samples": data.samples,
        "classes": data.num_classes,
        "augmentation": dict(data.augmentation),
        "seed": recipe.train.seed if data.varies else None,
        "batch_size": None,
        "device": None,
        **data.drawn_with(recipe.train.batch_size, device),
        "teacher": _teacher_facts(recipe.teacher),
        "epochs": recipe.train.epochs if data.varies else 1,
    }


def top_k_temperature(recipe: Recipe) -> float:
    """The temperature at which the recipe's method reads a teacher known at K classes.

    Raises ``RecipeError`` that names a store for a method that is not defined for such a teacher.
    """
    try:
        return find_method(recipe.method).top_k_temperature(recipe.options)
    except ValueError as error:
        raise RecipeError(
            f"method {recipe.method} cannot learn from the top k classes: {error}; cache the teacher with "
            "--store features or --store logits"
        ) from None


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


class TeacherCache:
    """A finished cache, opened for reading. Raises ``CacheError``."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder = Path(folder)
        try:
            self.facts = read_facts(folder / _FACTS)
            self._samples, self._epochs = int(self.facts["samples"]), int(self.facts["epochs"])
            self.store = stored_as(self.facts, lambda: _read_head(folder))
            expected = self.store.record
            if self._epochs < 1 or not isinstance(self.facts.get("val_accuracy", 0.0), float | int):
                raise ValueError(f"{_FACTS} is damaged")
            for epoch in range(self._epochs):
                os.close(open_regular(folder / shard_name(epoch)))
            # Memory-mapped, and never unpickled.
            self._shards = [
                np.load(folder / shard_name(epoch), mmap_mode="r", allow_pickle=False)
                for epoch in range(self._epochs)
            ]
        except OldFormatError as error:
            raise CacheError(f"teacher.cache: {folder} {error}") from None
        except Exception as error:  # NumPy raises many types for damaged headers
            raise CacheError(
                f"teacher.cache: {folder} is not a complete cache of a teacher: {one_line(error)}"
            ) from None
        for epoch, shard in enumerate(self._shards):
            if shard.dtype != expected or shard.shape != (self._samples,):
                raise CacheError(f"teacher.cache: {folder / shard_name(epoch)} does not match {_FACTS}")
            # Finds truncated files at once, not only when their epoch begins.
            if not _shard_has(has_digest, folder / shard_name(epoch)):
                raise CacheError(
                    f"teacher.cache: {folder} is not a complete cache of a teacher: {shard_name(epoch)} "
                    "is truncated"
                )
        self._checked: set[int] = set()

    def _check(self, epoch: int) -> None:
        """Raise ``CacheError`` if an epoch's file is damaged; called once per epoch, before its first use."""
        path = self.folder / shard_name(epoch)
        if not _shard_has(is_whole, path):
            raise CacheError(
                f"teacher.cache: {path} is damaged: its SHA-256 does not match. To rebuild it, delete it, "
                f"rename the folder to {self.folder.name}.partial, and run the same `fastkd cache-teacher`"
            )
        self._checked.add(epoch)

    @property
    def bytes_per_sample(self) -> int:
        return self._shards[0].dtype.itemsize

    @property
    def bytes_in_all(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def teacher(self) -> GivenTeacher:
        """The teacher of a method that is trained on a ``CachedLoader``."""
        return self.store.teacher()

    def outputs(self, epoch: int, indices: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        """What ``teacher()`` takes for training images in an epoch, counting from 0."""
        return self.store.unpack(self._present(epoch, indices), device)

    def check_mixed(self, epoch: int, read: Tensor, unreadable: Tensor) -> None:
        """Raise ``CacheError`` unless the same images of a mixed batch could be read for the cache.

        An image is mixed with the nearest one before it that can be read.
        """
        self._present(epoch, read)
        _, absent = self._records(epoch, unreadable)
        if not absent.all():
            raise CacheError(
                f"teacher.cache: {self.folder} was made with training image {int(unreadable[~absent][0])}, "
                f"which cannot be read now, in epoch {epoch + 1}: the image after it is mixed otherwise; "
                "restore it, or create the cache again"
            )

    def _present(self, epoch: int, indices: Tensor) -> np.ndarray:
        records, absent = self._records(epoch, indices)
        if absent.any():
            raise CacheError(
                f"teacher.cache: {self.folder} lacks training image {int(indices[absent][0])} in epoch "
                f"{epoch % self._epochs + 1}: it could not be read when the cache was made"
            )
        return records

    def _records(self, epoch: int, indices: Tensor) -> tuple[np.ndarray, Tensor]:
        """Of training images, and which of them could not be read when the cache was made."""
        epoch %= self._epochs  # without randomness one epoch is cached
        if epoch not in self._checked:
            self._check(epoch)
        records = self._shards[epoch][indices.numpy()]
        return records, torch.from_numpy(np.isnan(records[self.store.half]).any(1))

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
            other = any(text.startswith("temperature:") for text in differ)
            raise CacheError(
                f"teacher.cache: {self.folder} does not fit this recipe: {'; '.join(differ)}; "
                "create a cache for it with `fastkd cache-teacher`"
                + (" (--store features serves every temperature)" if other else "")
            )


class CachedLoader:
    """Yields ``(images, target, *outputs)`` from a loader and the cache that was made with it.

    The method's teacher must be ``cache.teacher()``, which makes logits of the outputs.

    Raises ``CacheError`` if the loader has another number of images than the cache was made for, or another
    seed or batch size where the images depend on it. That they are the same images is for the caller to see
    to, or for ``cache.check_fits(wanted_facts(recipe, data, device))``.
    """

    def __init__(self, loader: IndexedLoader, cache: TeacherCache) -> None:
        if not isinstance(loader, IndexedLoader):
            raise CacheError(
                f"loader is a {type(loader).__name__}; expected a training loader of fastkd, which knows its "
                "images' numbers: load_data(recipe.data).train_loader(batch_size, seed, device)"
            )
        for name, value in loader.order_facts.items():
            made_for = cache.facts.get(name)
            if made_for not in (None, value):
                raise CacheError(
                    f"loader: its {name} is {value}, the cache {cache.folder} was made for {made_for}; make "
                    "the loader of the data and options that `fastkd cache-teacher` had"
                )
        self._loader, self._cache, self._epoch = loader, cache, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._loader.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return with_rows(self.batches())

    def batches(
        self, start: int = 0, rank: int = 0, world: int = 1, even: bool = False
    ) -> Iterator[tuple[Tensor, ...]]:
        for images, target, indices in self._loader.indexed(start, rank, world, even):
            if self._loader.mixed_from is not None and len(indices):
                self._cache.check_mixed(self._epoch, *self._loader.mixed_from)
            yield images, target, *self._cache.outputs(self._epoch, indices, images.device)


class CacheWriter:
    """Writes a cache epoch by epoch into ``FOLDER.partial``, which is renamed when it is complete.

    A partial cache with the same facts is resumed after its last complete epoch. Raises ``CacheError`` if
    ``folder`` exists, or if the partial cache has other facts.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], store: Store) -> None:
        if os.path.lexists(folder):
            raise CacheError(f"{folder} already exists; a cache is never overwritten: choose another folder")
        self._folder = folder
        self.partial = folder.with_name(folder.name + ".partial")
        self._store = store
        self._facts = {"format": FORMAT, **facts, **store.facts}
        make_folder(self.partial)
        path = self.partial / _FACTS
        if path.exists():
            try:
                begun = read_facts(path)
            except OldFormatError as error:
                raise CacheError(f"{self.partial} {error}, and delete it") from None
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise CacheError(f"{path} cannot be read: {error}; delete {self.partial}") from None
            if begun != json.loads(json.dumps(self._facts)):
                raise CacheError(
                    f"{self.partial} was started for another recipe or store; choose another folder"
                )
        elif not all(path.name.startswith(".") for path in self.partial.iterdir()):  # lock, temporary files
            raise CacheError(
                f"{self.partial} exists and is not a cache that was begun (it has no {_FACTS}); choose "
                "another folder"
            )
        else:
            sealed = {**self._facts, "sha256": digest_of(self._facts)}
            text = json.dumps(sealed, indent=2) + "\n"
            write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        if isinstance(store, FeaturesStore):
            save_checkpoint(self.partial / _HEAD, store.head.state_dict())

    def missing_epochs(self) -> list[int]:
        return [e for e in range(self._facts["epochs"]) if not (self.partial / shard_name(e)).exists()]

    def write_epoch(self, epoch: int, batches: Iterator[tuple[Tensor, tuple[Tensor, ...]]]) -> None:
        """Write an epoch of (sample indices, what ``Store.of_teacher`` gave)."""
        kind, absent = self._store.record, np.ones(self._facts["samples"], bool)

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
            for indices, outputs in batches:
                if not all(bool(output.isfinite().all()) for output in outputs):
                    raise CacheError(f"the teacher's {self._store.name} are not finite in epoch {epoch + 1}")
                shard[indices.numpy()] = self._store.pack(*outputs)
                absent[indices.numpy()] = False
            shard[self._store.half][absent] = np.nan
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


class OldFormatError(ValueError):
    """The cache was made by an older version, whose records differ."""


def read_facts(path: Path) -> dict[str, Any]:
    """Read cache.json. Raises ``OSError``, and ``ValueError`` or ``KeyError`` if it is damaged."""
    facts: dict[str, Any] = json.loads(read_regular(path))
    if facts["format"] in _BEFORE:
        raise OldFormatError(
            f"was made by an older version of fastkd ({facts['format']}; this one reads {FORMAT}), whose "
            "records had no temperature; create it again with `fastkd cache-teacher`"
        )
    if facts["format"] != FORMAT:
        raise ValueError(f"its format is {facts['format']!r}, expected {FORMAT!r}")
    if facts.pop("sha256", None) != digest_of(facts):
        raise ValueError(f"{_FACTS} is damaged: its SHA-256 does not match")
    return facts


def _read_head(folder: Path) -> GivenFeatures:
    state = load_checkpoint(folder / _HEAD, remedy="create the cache again")
    return GivenFeatures(state["weight"], state.get("bias"))


def _shard_has(look: Callable[[BinaryIO], bool], path: Path) -> bool:
    with path.open("rb") as file:
        return look(file)


def shard_name(epoch: int) -> str:
    return f"epoch-{epoch:04d}.npy"

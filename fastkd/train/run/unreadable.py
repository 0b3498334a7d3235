"""The images that a run could not read, over all ranks and from before it was resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastkd.data.corrupt import CorruptImages
from fastkd.train import distributed
from fastkd.train.watcher import ForwardingWatcher, Record, Watcher

_KEY = "corrupt_images"  # of a state; states of older versions lack it


class UnreadableImages(ForwardingWatcher):
    """Joins the ranks' ``images`` before each state, and adds them to it. Every rank has one.

    Raises ``DataError``, on all ranks, if there are more than the limit.
    """

    def __init__(self, shown: Watcher, images: CorruptImages, resume: Mapping[str, Any] | None) -> None:
        super().__init__(shown)
        self._images = images
        images.update((resume or {}).get(_KEY, {}))

    def epoch_done(self, record: Record, state: Callable[[], dict[str, Any]]) -> None:
        super().epoch_done(record, self._joined(state))

    def checkpoint(self, epoch: int, step: int, state: Callable[[], dict[str, Any]]) -> None:
        super().checkpoint(epoch, step, self._joined(state))

    def _joined(self, state: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        self._images.join(distributed.of_all_ranks(dict(self._images)))
        return lambda: {**state(), _KEY: dict(self._images)}

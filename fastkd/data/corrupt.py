"""Images that cannot be read: skipped and named, up to a limit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastkd.errors import DataError
from fastkd.messages import printable

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corrupt:
    """Returned in place of the pixels of an image that could not be read."""

    name: str
    index: int  # of the sample
    reason: str
    machine: bool = False  # an error of the machine; the image may be intact


class CorruptImages(dict[str, str]):
    """Skipped images and the reasons, by name; more than ``limit`` end the run.

    Those of this rank, until ``join`` adds the other ranks'.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def add(self, image: Corrupt) -> None:
        """Raises ``DataError`` beyond the limit, and for an error of the machine."""
        if image.machine:
            raise DataError(
                f"{image.name} cannot be read: {image.reason} (an error of this machine, not of the image)"
            )
        if image.name in self:
            return
        self[image.name] = image.reason
        self._check()
        name = printable(image.name)
        _log.warning("skipped %s (%d of at most %d): %s", name, len(self), self.limit, image.reason)

    def join(self, of_ranks: Sequence[Mapping[str, str]]) -> None:
        """Take the images of all ranks, in the same order on each. Raises ``DataError`` beyond the limit."""
        self.clear()
        for images in of_ranks:
            self.update(images)
        self._check()

    def _check(self) -> None:
        if len(self) > self.limit:
            listed = "\n".join(f"  {name}: {reason}" for name, reason in list(self.items())[:20])
            raise DataError(
                f"{len(self)} images cannot be read, more than data.corrupt_limit = {self.limit}:\n{listed}"
            )

"""Tar shards in the WebDataset format: which they are, and where their samples are."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.errors import DataError
from fastkd.files.regular import open_regular

from .headers import members
from .index import LeftOut, Part, part_of

_MOST_SHARDS = 1_000_000
LARGEST_LABEL = 2**24 - 1  # a network has one output per label up to the largest
SUFFIXES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp")  # of images in shards


def expand(root: Path, pattern: str) -> list[Path]:
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


def samples_of(shard: Path) -> Part:
    """Key of each sample with an image and a label; beside it offset and size of the image, and the label.

    Hidden files (macOS's ``._NAME``) are ignored.
    """
    webdataset = _webdataset()
    keys: list[str] = []
    numbers: list[tuple[int, int, int]] = []
    left_out = LeftOut()
    try:
        found = (
            {"fname": name, "data": place, "__url__": ""}
            for name, *place in members(shard)
            if not name.rpartition("/")[2].startswith(".")
        )
        content = open_regular(shard)
        try:
            end = os.fstat(content).st_size
            for sample in webdataset.tariterators.group_by_keys(found):
                image = next((sample[suffix] for suffix in SUFFIXES if suffix in sample), None)
                if image is None or "cls" not in sample:
                    _check_dots(shard, sample)
                    left_out = LeftOut(left_out.samples + 1, left_out.first or sample["__key__"])
                    continue
                if sum(image) > end or sum(sample["cls"]) > end:
                    raise DataError(f"the shard {shard} is truncated at sample {sample['__key__']}")
                offset, size = sample["cls"]
                text = os.pread(content, size, offset)
                if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", text) or int(text) > LARGEST_LABEL:
                    raise DataError(
                        f"the shard {shard}: {sample['__key__']}.cls is {text[:20]!r}; "
                        f"expected a number from 0 to {LARGEST_LABEL}"
                    )
                keys.append(sample["__key__"])
                numbers.append((*image, int(text)))
        finally:
            os.close(content)
    except DataError:
        raise
    except Exception as error:  # tarfile raises many types for damaged headers
        raise DataError(f"the shard {shard} cannot be read: {error}") from None
    return part_of(keys, np.array(numbers, np.int64).reshape(-1, 3), left_out)


def _check_dots(shard: Path, sample: dict[str, Any]) -> None:
    """Raise ``DataError`` if an incomplete sample has an image or a label behind a second dot."""
    key = sample["__key__"]
    for suffix in sample:
        if suffix.endswith((".cls", *(f".{known}" for known in SUFFIXES))):
            raise DataError(
                f"the shard {shard}: {key}.{suffix} belongs to sample {key}, as webdataset splits names at "
                f"the first dot, and that sample lacks an image or a label; expected {key}.jpg (or "
                f"{', '.join(SUFFIXES[1:])}) and {key}.cls: keys without a dot"
            )


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError:
        raise DataError(
            "data.name = webdataset needs the webdataset library, which is not installed: "
            'pip install "fastkd[webdataset]"'
        ) from None
    return webdataset

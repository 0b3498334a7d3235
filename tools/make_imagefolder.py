"""Make a tree of JPEG files like ImageNet's, to run the ImageNet recipes without ImageNet.

    python tools/make_imagefolder.py FOLDER             # 1000 classes, 4 images of each, 400 MB
    python tools/make_imagefolder.py FOLDER --tiny      # 4 classes of small images, for tests
    python tools/make_imagefolder.py FOLDER --shards 4  # tar shards in WebDataset's format
    python tools/make_imagefolder.py FOLDER --train 1 --scale 0.1 --totals 1281167 50000  # ImageNet's count

With ``--totals`` the images of a class are repeated, as hard links in a tree and as copies in shards. The
last line needs 80 MB, most of it for the names, and 5 GB with ``--shards 1024``.

Sizes are distributed like ImageNet's: half of the images are 500 x 375, most of the others have a longer side
of 500, and the rest are around 400 x 350; a file has about 95 kB. Colours and grain depend on the class, so
that a model can learn it.
"""

from __future__ import annotations

import argparse
import errno
import functools
import io
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

# (width, height) and the share of ImageNet's images with about this size.
COMMON = {(500, 375): 0.48, (375, 500): 0.12, (500, 333): 0.11, (333, 500): 0.04, (500, 400): 0.03}


def draw_size(random: np.random.Generator, scale: float) -> tuple[int, int]:
    """Width and height of one image."""
    chosen = random.choice(len(COMMON) + 1, p=[*COMMON.values(), 1 - sum(COMMON.values())])
    sizes = [*COMMON, np.clip(random.lognormal((6.0, 5.85), 0.45), 60, 3000)]
    width, height = sizes[chosen]
    return max(8, round(width * scale)), max(8, round(height * scale))


def draw_picture(random: np.random.Generator, label: int, size: tuple[int, int]) -> Image.Image:
    """Smooth shapes with detail on every scale, like photographs; colours and grain depend on the class."""
    width, height = size
    of_class = np.random.default_rng([label, 7])
    colour, grain = of_class.uniform(40, 215, 3), of_class.uniform(0.76, 0.88)
    pixels = np.zeros((height, width, 3), np.float32) + colour.astype(np.float32)
    strength, cells = 55.0, 3
    while cells < max(size):
        rough = random.normal(0, strength, (cells, cells, 3)).clip(-127, 127) + 128
        smooth = Image.fromarray(rough.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        pixels += np.asarray(smooth, np.float32) - 128
        strength, cells = strength * grain, cells * 2
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@functools.lru_cache(maxsize=2000)
def picture(part: int, label: int, number: int, scale: float, seed: int) -> bytes:
    """The JPEG file of one image."""
    random = np.random.default_rng([seed, part, label, number])
    file = io.BytesIO()
    drawn = draw_picture(random, label, draw_size(random, scale))
    drawn.save(file, "JPEG", quality=int(random.integers(88, 97)))
    return file.getvalue()


def numbered(classes: int, drawn: int, total: int | None) -> Iterator[tuple[int, int]]:
    """(label, number) of each image of a part, class by class: ``drawn`` per class, or ``total`` over all."""
    per_class, more = (drawn, 0) if total is None else divmod(total, classes)
    for label in range(classes):
        for number in range(per_class + (label < more)):
            yield label, number


def make_tree(
    folder: Path,
    classes: int,
    train: int,
    val: int,
    *,
    totals: tuple[int | None, int | None] = (None, None),
    scale: float = 1.0,
    seed: int = 0,
) -> int:
    """``folder/train/CLASS/*.JPEG`` and ``folder/val/CLASS/*.JPEG``; returns the number of bytes written.

    ``totals``: images of train and val, where those beyond ``train`` and ``val`` per class are hard links.
    """
    written = 0
    for part, (name, drawn) in enumerate((("train", train), ("val", val))):
        at = {}  # the file that the next repetition of an image is linked to
        for label, number in numbered(classes, drawn, totals[part]):
            path = folder / name / f"n{label:08d}" / f"{name}_{label}_{number}.JPEG"
            if number >= drawn and linked(at[label, number % drawn], path):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            content = picture(part, label, number % drawn, scale, seed)
            path.write_bytes(content)
            at[label, number % drawn] = path
            written += len(content)
    return written


def linked(path: Path, other: Path) -> bool:
    """Hard-link ``other`` to ``path``; False if a file cannot have more links (ext4: 65,000)."""
    try:
        os.link(path, other)
    except OSError as error:
        if error.errno != errno.EMLINK:
            raise
        return False
    return True


def make_shards(
    folder: Path,
    classes: int,
    train: int,
    val: int,
    shards: int,
    *,
    totals: tuple[int | None, int | None] = (None, None),
    scale: float = 1.0,
    seed: int = 0,
) -> int:
    """``folder/train-0000.tar`` … and ``folder/val-0000.tar`` …; returns the number of bytes of the images.

    ``totals`` as for ``make_tree``, but each repetition is a copy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for part, (name, drawn) in enumerate((("train", train), ("val", val))):
        samples = list(numbered(classes, drawn, totals[part]))
        for shard in range(shards):
            with tarfile.open(folder / f"{name}-{shard:04d}.tar", "w") as archive:
                for label, number in samples[shard::shards]:
                    content = picture(part, label, number % drawn, scale, seed)
                    for suffix, data in (("jpg", content), ("cls", str(label).encode())):
                        member = tarfile.TarInfo(f"{label:04d}_{number:04d}.{suffix}")
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
                    written += len(content)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--train", type=int, default=3, help="training images per class")
    parser.add_argument("--val", type=int, default=1, help="validation images per class")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the image sides")
    parser.add_argument(
        "--shards", type=int, metavar="N", help="write N tar shards each for train and val instead of a tree"
    )
    parser.add_argument(
        "--totals",
        type=int,
        nargs=2,
        metavar=("TRAIN", "VAL"),
        help="images in all, by repeating those drawn",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="4 classes, 4 + 2 images each, sides divided by 5"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.folder.exists() and any(args.folder.iterdir()):
        print(f"{args.folder} is not empty; name a new folder", file=sys.stderr)
        return 2
    counts = (4, 4, 2) if args.tiny else (args.classes, args.train, args.val)
    scale = 0.2 if args.tiny else args.scale
    totals = tuple(args.totals) if args.totals else (None, None)
    for total, drawn in zip(totals, counts[1:], strict=True):
        if total is not None and total < counts[0] * drawn:
            print(
                f"--totals: {total} is less than {drawn} images of each of {counts[0]} classes",
                file=sys.stderr,
            )
            return 2
    options = {"totals": totals, "scale": scale, "seed": args.seed}
    if args.shards:
        written = make_shards(args.folder, *counts, args.shards, **options)
    else:
        written = make_tree(args.folder, *counts, **options)
    images = sum(args.totals or (counts[0] * count for count in counts[1:]))
    print(f"{args.folder}: {counts[0]} classes, {images:,} images, {written / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

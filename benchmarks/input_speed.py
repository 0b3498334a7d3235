"""Images per second and core of fastkd's input beside torchvision's, from JPEG files to normalised batches.

    python tools/make_imagefolder.py TREE --classes 100 --train 4 --val 1      # 500 files of ImageNet's sizes
    python benchmarks/input_speed.py TREE --output FILE.jsonl
    python benchmarks/input_speed.py --table FILE.jsonl                        # for docs/reports/imagenet.md

torchvision   ``ImageFolder``, ``DataLoader`` and the transforms of torchvision's references: Pillow decodes
              and crops; ``PILToTensor``, ``ToDtype`` and ``Normalize`` in the worker
of tensors    the same after ``PILToTensor``: the crop is of a uint8 tensor
fastkd        ``data.name=imagefolder``, as `fastkd train` uses it: normalised on the device
torchcodec    the same with ``data.decoder=torchcodec``, if it is installed

They take turns, each a pass over all images with one data worker, in alternating order. A turn's figure is
images per CPU second of the worker and of the loading process together, which other processes on the machine
hardly change. A ratio is the median of those between the same turns. Training transforms at 224 px (--val:
resize to 256, crop).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastkd.bench.command import positive
from fastkd.bench.protocol import percentile
from fastkd.bench.report import table
from fastkd.bench.results import Record, Writer, header, read
from fastkd.data.files import load_file_data
from fastkd.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from fastkd.errors import DataError
from fastkd.recipe.sections import FolderData

CPU = torch.device("cpu")
Pass = Callable[[], Iterator[Any]]


def of_torchvision(args: argparse.Namespace, *, of_tensors: bool) -> Pass:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    if args.val:
        crop: list[Any] = [v2.Resize(args.size * 8 // 7), v2.CenterCrop(args.size)]
    else:
        crop = [v2.RandomResizedCrop(args.size), v2.RandomHorizontalFlip()]
    steps = [v2.PILToTensor(), *crop] if of_tensors else [*crop, v2.PILToTensor()]
    last = [v2.ToDtype(torch.float, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    images = ImageFolder(str(args.root / "train"), v2.Compose([*steps, *last]))

    def whole() -> Iterator[Any]:
        # Its worker is forked, as FileLoader's is: a fork server's would not be in RUSAGE_CHILDREN.
        loader = torch.utils.data.DataLoader(
            images,
            args.batch,
            shuffle=True,
            num_workers=1,
            multiprocessing_context="fork",
            generator=torch.Generator(),
        )
        yield from loader

    return whole


def of_fastkd(args: argparse.Namespace, decoder: str) -> Pass:
    config = FolderData.model_validate(
        {
            "name": "imagefolder",
            "root": str(args.root),
            "size": args.size,
            "workers": 1,
            "decoder": decoder,
            "augment": not args.val,
        }
    )
    data = load_file_data(config)

    def whole() -> Iterator[tuple[Tensor, Tensor]]:
        loader = data.train_loader(args.batch, 0, CPU)  # a new one, so that its worker ends with the pass
        yield from loader

    return whole


def cpu_seconds() -> float:
    """Of this process and of all its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(of_one.ru_utime + of_one.ru_stime for of_one in used)


def rate(whole: Pass) -> float:
    """Images per CPU second of one pass."""
    before, count = cpu_seconds(), 0
    batches = whole()
    for images, _ in batches:
        assert images.dtype == torch.float32
        count += len(images)
    del batches
    return count / (cpu_seconds() - before)


def measure(args: argparse.Namespace) -> tuple[dict[str, str], list[Record]]:
    variants = {
        "torchvision": of_torchvision(args, of_tensors=False),
        "of tensors": of_torchvision(args, of_tensors=True),
        "fastkd": of_fastkd(args, "pillow"),
    }
    missing = {}
    try:
        variants["torchcodec"] = of_fastkd(args, "torchcodec")
    except DataError as error:
        missing["torchcodec"] = str(error)
    for whole in variants.values():  # the first pass imports, and reads the files from the disk
        rate(whole)
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(args.turns):
        for name in variants if turn % 2 else reversed(variants):
            rates[name].append(rate(variants[name]))
        print(f"turn {turn + 1}:", {name: round(of[-1], 1) for name, of in rates.items()}, flush=True)
    records: list[Record] = []
    for name, of in rates.items():
        ratio = statistics.median(a / b for a, b in zip(of, rates["torchvision"], strict=True))
        low, median, high = (percentile(of, share) for share in (0.2, 0.5, 0.8))
        record = {"variant": name, "images_per_cpu_second": median, "p20": low, "p80": high}
        records.append({"kind": "input_speed", **record, "turns": args.turns, "over_torchvision": ratio})
    return missing, records


def print_table(paths: list[Path]) -> None:
    """The Markdown table of result files."""
    rows = []
    for path in paths:
        about, records = read(path)
        what = "validation" if about["settings"]["val"] else "training"
        for record in records:
            spread = f"{record['p20']:.0f} to {record['p80']:.0f}"
            speed = f"{record['images_per_cpu_second']:.0f}"
            rows.append([f"{what}, {record['variant']}", speed, spread, f"{record['over_torchvision']:.2f}"])
    print(table(["", "images per second and core", "p20 to p80", "over torchvision"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, nargs="?", help="folder with train/CLASS and val/CLASS")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE.jsonl")
    parser.add_argument("--val", action="store_true", help="the transforms of validation")
    parser.add_argument("--size", type=positive, default=224)
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--turns", type=positive, default=5)
    args = parser.parse_args()
    if args.table:
        print_table(args.table)
        return
    if args.root is None or args.output is None:
        parser.error("a folder and --output, or --table, are needed")
    torch.set_num_threads(1)
    settings = {key: value for key, value in vars(args).items() if key not in ("root", "output", "table")}
    with Writer(args.output) as output:
        missing, records = measure(args)
        output.write([header("cpu", missing, settings=settings), *records])


if __name__ == "__main__":
    main()

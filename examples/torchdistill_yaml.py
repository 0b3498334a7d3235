"""Runs a torchdistill config whose loss is fastkd's, through torchdistill's own distillation box.

Needs torchdistill: pip install torchdistill
Seconds on a CPU: python examples/torchdistill_yaml.py examples/torchdistill/dkd.yaml
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

try:
    from torchdistill.common import yaml_util
    from torchdistill.common.main_util import import_dependencies
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.losses import high_level, mid_level  # noqa: F401  # they register themselves
except ImportError:
    raise SystemExit("this example needs torchdistill: pip install torchdistill") from None

CONFIG = Path(__file__).parent / "torchdistill" / "kd.yaml"
CLASSES, FEATURES = 50, 32


def network(width: int) -> nn.Module:
    # The configs name the layer `head`, whose output is the logits.
    body = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU())
    return nn.Sequential(OrderedDict(body=body, head=nn.Linear(width, CLASSES)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default=CONFIG, type=Path)
    parser.add_argument("--epochs", type=int, help="instead of the config's")
    options = parser.parse_args()

    config = yaml_util.load_yaml_file(str(options.config))
    import_dependencies(config["dependencies"])
    if options.epochs is not None:
        config["train"]["num_epochs"] = options.epochs

    torch.manual_seed(0)
    # Labels by a random network stand for a data set; the same network is the teacher.
    teacher = network(64).requires_grad_(False)
    teacher.head.weight.mul_(
        20
    )  # a trained teacher's logits have a spread of a few units, a new one's of 0.2
    inputs = torch.randn(4000, FEATURES)
    target = teacher(inputs).argmax(1)
    parts = {"train": slice(0, 2000), "val": slice(2000, 4000)}
    data = {name: TensorDataset(inputs[part], target[part]) for name, part in parts.items()}

    student = network(48)
    box = get_distillation_box(teacher, student, data, config["train"], torch.device("cpu"), None, False, 1)
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        for batch, labels, supplement in box.train_data_loader:
            box.pre_forward_process()
            loss = box.forward_process(batch, labels, supplement)
            box.post_forward_process(loss=loss)
        box.post_epoch_process()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    student.eval()
    with torch.no_grad():
        hits = [(student(batch).argmax(1) == labels).float() for batch, labels in box.val_data_loader]
    print(f"accuracy {100 * torch.cat(hits).mean():.1f} %")


if __name__ == "__main__":
    main()

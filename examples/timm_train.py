"""timm's training script, or a loop of timm's parts, with the distillation loss computed by fastkd.

Needs timm: pip install 'timm>=1.0.27'
Seconds on a CPU, random images: python examples/timm_train.py
timm's own script, in a checkout of timm, with its distillation options (all arguments are the script's):
    python examples/timm_train.py PATH/train.py --data-dir IMAGENET --model resnet18 --kd-model-name resnet34
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

import torch
from torch import nn

try:
    import timm
    import timm.task
except ImportError:
    raise SystemExit("this example needs timm: pip install 'timm>=1.0.27'") from None

from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy

from fastkd.integrations.timm import LogitDistillationTask


def run_script(path: Path) -> None:
    """Run timm's ``train.py`` with the same task on fastkd's loss: the script imports it by this name."""
    timm.task.LogitDistillationTask = LogitDistillationTask
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(path.resolve().parent))
    runpy.run_path(str(path), run_name="__main__")


def run_loop(epochs: int) -> None:
    torch.manual_seed(0)
    # Ten classes of images: a pattern each, under noise.
    patterns = torch.randn(10, 3, 32, 32)
    target = torch.randint(0, 10, (320,))
    images = patterns[target] + 2 * torch.randn(320, 3, 32, 32)
    batches = list(zip(images.split(64), target.split(64), strict=True))

    student = timm.create_model("resnet10t", num_classes=10)
    teacher = timm.create_model("resnet18", num_classes=10)  # in practice pretrained=True, or its name
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    # Was: timm.task.LogitDistillationTask(...), with the same arguments and results.
    task = LogitDistillationTask(student, teacher, criterion, task_loss_weight=0.5, temperature=2.0)

    optimizer = create_optimizer_v2(student, opt="adamw", lr=2e-3)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=0)
    for epoch in range(epochs):
        task.train()
        losses, top1 = AverageMeter(), AverageMeter()
        for inputs, labels in batches:
            result = task(inputs, labels)
            optimizer.zero_grad()
            result["loss"].backward()
            optimizer.step()
            losses.update(result["loss"].item(), len(labels))
            top1.update(accuracy(result["output"], labels)[0].item(), len(labels))
        scheduler.step(epoch + 1)
        print(f"epoch {epoch + 1}: loss {losses.avg:.3f}, training accuracy {top1.avg:.1f} %")


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1].endswith(".py"):
        run_script(Path(sys.argv[1]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    run_loop(parser.parse_args().epochs)


if __name__ == "__main__":
    main()

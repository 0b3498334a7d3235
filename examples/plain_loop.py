"""A plain PyTorch training loop with three losses of fastkd, and the labels alone for comparison.

Needs only fastkd. Seconds on a CPU: python examples/plain_loop.py
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import fastkd

CLASSES, FEATURES = 50, 32


def make_data(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random inputs, labelled by a fixed random network: a problem that is hard to learn from few samples."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(FEATURES, 64, generator=generator) / FEATURES**0.5
    second = torch.randn(64, CLASSES, generator=generator)
    inputs = torch.randn(samples, FEATURES, generator=torch.Generator().manual_seed(seed))
    return inputs, (torch.relu(inputs @ first) @ second).argmax(1)


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))


def train(student: nn.Module, teacher: nn.Module, loss: nn.Module, data: tuple, epochs: int) -> None:
    inputs, target = data
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs)).split(128):
            with torch.no_grad():
                teacher_logits = teacher(inputs[batch])
            # Terms are detached and unweighted, for logging.
            total, terms = loss(student(inputs[batch]), teacher_logits, target[batch])
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        schedule.step()
    print("   ", ", ".join(f"{name} {value:.3f}" for name, value in terms.items()), "in the last batch")


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return 100 * (model(data[0]).argmax(1) == data[1]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--samples", type=int, default=2000, help="for the student; the teacher has 10 times more"
    )
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()

    validation = make_data(2000, seed=1)
    labels = fastkd.DistillLoss(ce_weight=1.0)  # distillation weights are 0: the teacher is not read
    torch.manual_seed(0)
    teacher = network(width=256)
    print("teacher")
    train(teacher, teacher, labels, make_data(10 * options.samples, seed=2), max(options.epochs // 3, 1))
    print(f"    accuracy {accuracy(teacher, validation):.1f} %")
    teacher.requires_grad_(False)

    losses = {
        "labels": labels,
        "KD: 0.1 CE + 0.9 KD": fastkd.DistillLoss(ce_weight=0.1, kd_weight=0.9, temperature=2.0),
        "DKD: CE + TCKD + 4 NCKD": fastkd.DistillLoss(
            ce_weight=1.0, tckd_weight=1.0, nckd_weight=4.0, temperature=2.0
        ),
        "LSKD: 0.1 CE + 3 KD of standardised logits": fastkd.DistillLoss(
            ce_weight=0.1, kd_weight=3.0, temperature=2.0, standardize=True
        ),
    }
    for name, loss in losses.items():
        torch.manual_seed(0)
        student = network(width=96)
        print(name)
        train(student, teacher, loss, make_data(options.samples, seed=3), options.epochs)
        print(f"    accuracy {accuracy(student, validation):.1f} %")


if __name__ == "__main__":
    main()

"""A Lightning Fabric loop: the loss is called as any other, on several devices and in mixed precision too.

Needs lightning-fabric (or lightning): pip install lightning-fabric
Seconds on a CPU: python examples/fabric_loop.py --devices 2 --precision bf16-mixed
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

try:
    from lightning.fabric import Fabric
except ImportError:
    try:
        from lightning_fabric import Fabric
    except ImportError:
        raise SystemExit("this example needs Lightning Fabric: pip install lightning-fabric") from None

import fastkd

CLASSES, FEATURES = 50, 32


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--precision", default="32-true")
    options = parser.parse_args()

    fabric = Fabric(accelerator=options.accelerator, devices=options.devices, precision=options.precision)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)

    # Labels by a random network stand for a data set; the same network is the teacher.
    teacher = network(64).requires_grad_(False).eval()
    teacher[-1].weight.mul_(20)  # a trained teacher's logits have a spread of a few units, a new one's of 0.2
    inputs = torch.randn(4000, FEATURES)
    target = teacher(inputs).argmax(1)
    training = TensorDataset(inputs[:2000], target[:2000])
    loader = fabric.setup_dataloaders(DataLoader(training, batch_size=128, shuffle=True))

    student = network(48)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    # Fabric wraps the student only. The teacher has no gradient: DDP would refuse it.
    student, optimizer = fabric.setup(student, optimizer)
    teacher = fabric.to_device(teacher)
    loss = fastkd.DistillLoss(ce_weight=0.1, kd_weight=0.9, temperature=2.0)

    for epoch in range(options.epochs):
        student.train()
        for batch, labels in loader:
            with torch.no_grad(), fabric.autocast():
                teacher_logits = teacher(batch)
            total, terms = loss(student(batch), teacher_logits, labels)
            optimizer.zero_grad()
            fabric.backward(total)
            fabric.clip_gradients(student, optimizer, max_norm=5.0)
            optimizer.step()
        fabric.print(f"epoch {epoch + 1}: " + ", ".join(f"{name} {term:.3f}" for name, term in terms.items()))

    student.eval()
    with torch.no_grad():
        held_out, labels = fabric.to_device((inputs[2000:], target[2000:]))
        accuracy = (student(held_out).argmax(1) == labels).float().mean()
    fabric.print(f"accuracy {100 * accuracy:.1f} %")


if __name__ == "__main__":
    main()

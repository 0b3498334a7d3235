"""A Hugging Face Accelerate loop with DHKD: an auxiliary head, gradient accumulation and gradient alignment.

Needs accelerate: pip install accelerate
Seconds on a CPU: python examples/accelerate_loop.py
On several devices: accelerate launch examples/accelerate_loop.py
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

try:
    from accelerate import Accelerator
except ImportError:
    raise SystemExit("this example needs accelerate: pip install accelerate") from None

from fastkd.distill import DHKD

CLASSES, FEATURES = 50, 32


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--accumulate", type=int, default=2)
    options = parser.parse_args()

    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), gradient_accumulation_steps=options.accumulate
    )
    torch.manual_seed(0)
    # Labels by a random network stand for a data set; the same network is the teacher.
    teacher = network(64).requires_grad_(False).eval()
    teacher[-1].weight.mul_(20)  # a trained teacher's logits have a spread of a few units, a new one's of 0.2
    inputs = torch.randn(4000, FEATURES)
    target = teacher(inputs).argmax(1)
    training = TensorDataset(inputs[:1920], target[:1920])
    loader = DataLoader(training, batch_size=64, shuffle=True)

    # The method holds student, auxiliary head and teacher. Accelerate wraps the method, not the student.
    # The auxiliary head reads layer "1", the input of the last layer.
    method = DHKD(network(48), teacher, alpha=0.1, align="shared", feature="1", example=inputs[:2])
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    prepared, optimizer, loader = accelerator.prepare(method, optimizer, loader)

    for epoch in range(options.epochs):
        method.set_epoch(epoch)
        prepared.train()
        for batch in loader:
            with accelerator.accumulate(prepared):
                with accelerator.autocast():
                    terms = prepared(batch)
                method.backward(terms, scaler=accelerator.scaler, micro_batches=options.accumulate)
                if accelerator.sync_gradients:
                    accelerator.unscale_gradients()
                    method.finish_gradients()  # aligns the gradients of the two losses
                    accelerator.clip_grad_norm_(method.parameters(), 5.0)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}: " + ", ".join(f"{n} {term:.3f}" for n, term in terms.items()))

    student = method.export().eval()  # the plain student, without the auxiliary head
    with torch.no_grad():
        held_out = inputs[1920:].to(accelerator.device)
        accuracy = (student(held_out).argmax(1).cpu() == target[1920:]).float().mean()
    accelerator.print(f"accuracy {100 * accuracy:.1f} %")


if __name__ == "__main__":
    main()

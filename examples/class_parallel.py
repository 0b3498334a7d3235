"""Distilling a face-like head whose classes are spread over processes: no process has all weights or logits.

Each process runs the backbone on its own images (DDP). The features of all are gathered, and each process
computes the logits of its own identities for all of them, in chunks that are never stored. Needs only fastkd.
About a minute on a CPU: python examples/class_parallel.py
or: torchrun --nproc-per-node 4 examples/class_parallel.py
"""

from __future__ import annotations

import argparse
import os
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fastkd

IDENTITIES, PIXELS, BATCH, SCALE = 10_001, 64, 64, 24.0  # images per process; of the cosines


class Gather(torch.autograd.Function):
    """The rows of all processes. Backward: own rows of the gradient, times W, for DDP takes the mean."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.chunk(dist.get_world_size())[dist.get_rank()] * dist.get_world_size()


class Network(nn.Module):
    """A backbone that every process has, and this process's part of the head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        rank, world = dist.get_rank(), dist.get_world_size()
        self.first = IDENTITIES * rank // world
        own = IDENTITIES * (rank + 1) // world - self.first
        layers = nn.Linear(PIXELS, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        self.backbone = DistributedDataParallel(nn.Sequential(*layers))  # begins with rank 0's weights
        self.head = nn.Parameter(torch.randn(own, width))

    def forward(self, images: Tensor) -> fastkd.ShardedLogits:
        features = Gather.apply(F.normalize(self.backbone(images)))
        local = fastkd.LinearLogits(features, F.normalize(self.head), scale=SCALE)
        return fastkd.ShardedLogits(local, first_class=self.first, num_classes=IDENTITIES)


def train(network: Network, teacher: Network | None, people: Tensor, steps: int) -> None:
    images_of = torch.Generator().manual_seed(dist.get_rank() + 1)
    weights = {"ce_weight": 1.0} if teacher is None else {"ce_weight": 0.1, "kd_weight": 0.9}
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(1, steps + 1):
        identity = torch.randint(IDENTITIES, (BATCH,), generator=images_of)
        images = people[identity] + 0.3 * torch.randn(BATCH, PIXELS, generator=images_of)
        student, target = network(images), Gather.apply(identity)
        with torch.no_grad():  # a cross-entropy alone reads no teacher
            known = student.detach() if teacher is None else teacher(images)
        loss, terms = fastkd.distill_loss(student, known, target, temperature=2.0, **weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0 and (step == 1 or step % 20 == 0 or step == steps):
            print(f"  step {step}: " + ", ".join(f"{name} {term:.3f}" for name, term in terms.items()))


def work(rank: int, world: int, meeting: str, steps: int) -> None:
    """One of the processes."""
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    torch.manual_seed(0)
    people = torch.randn(IDENTITIES, PIXELS)
    torch.manual_seed(rank)  # the parts of a head differ
    teacher, student = Network(width=64), Network(width=16)
    if rank == 0:
        print(f"{world} processes, of which this one has {len(teacher.head)} of {IDENTITIES} identities")
        print("A teacher, from the labels; then the student, from the labels and the teacher")
    train(teacher, None, people, steps)
    train(student, teacher.requires_grad_(False), people, steps)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    if "RANK" in os.environ:  # torchrun
        work(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://", steps)
    else:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(work, (2, f"file://{folder}/meeting", steps), nprocs=2)

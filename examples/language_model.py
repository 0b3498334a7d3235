"""Distilling a language model over a large vocabulary, without storing the student's logits.

The student is `LinearLogits` (its last hidden state and its head), the teacher `TopKLogits`: its 64 most
probable tokens, as a serving engine or a cache gives them. Needs only fastkd.
Under a minute on a CPU: python examples/language_model.py
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

import fastkd

VOCABULARY, USED = 8192, 256  # the texts use few of the tokens, so that seconds are enough
BATCH, LENGTH, IGNORED = 16, 32, -100


class Transformer(nn.Module):
    """A small causal transformer that returns its last hidden state; `head` maps it to the vocabulary."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.zeros(LENGTH, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, tokens.device)
        hidden = self.embedding(tokens) + self.position[:length]
        return self.norm(self.layers(hidden, mask, is_causal=True))


def make_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens, each one of four successors of the one before, and labels, both [batch, LENGTH - 1]."""
    tokens = [torch.randint(0, USED, (BATCH,), generator=generator)]
    odds = torch.tensor([8.0, 4.0, 2.0, 1.0])
    for _ in range(LENGTH - 1):
        choice = torch.multinomial(odds, BATCH, replacement=True, generator=generator)
        tokens.append((5 * tokens[-1] + 31 * choice + 7) % USED)
    text = torch.stack(tokens, dim=1)
    # Position t predicts token t + 1; what follows the end of a text is padding.
    end = torch.randint(LENGTH // 2, LENGTH + 1, (BATCH, 1), generator=generator)
    return text[:, :-1], text[:, 1:].masked_fill(torch.arange(1, LENGTH) >= end, IGNORED)


def train(model: Transformer, teacher: Transformer | None, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        tokens, labels = make_batch(generator)
        student = fastkd.LinearLogits(model(tokens), model.head.weight)  # stands for model.head(hidden)
        if teacher is None:
            known, weights = student.detach(), {"ce_weight": 1.0}  # not read by a cross-entropy alone
        else:
            with torch.no_grad():
                logits = fastkd.LinearLogits(teacher(tokens), teacher.head.weight)
                # With labels, each row's label is among the 64.
                known = fastkd.top_k(logits, 64, labels, temperature=2.0)
            weights = {"ce_weight": 0.1, "kd_weight": 0.9}
        loss, terms = fastkd.distill_loss(
            student, known, labels, temperature=2.0, ignore_index=IGNORED, **weights
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps:
            print(f"  step {step}: " + ", ".join(f"{name} {term:.3f}" for name, term in terms.items()))
    print(f"  {1000 * (time.perf_counter() - start) / steps:.0f} ms per step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    rows = BATCH * (LENGTH - 1)
    print(fastkd.explain(rows, VOCABULARY, loss="ce-kd", hidden=(64, 96)))
    torch.manual_seed(0)
    print("teacher, from the labels")
    teacher = Transformer(width=96)
    train(teacher, None, options.steps, seed=1)
    print("student, from the labels and the teacher's 64 most probable tokens")
    train(Transformer(width=64), teacher.requires_grad_(False), options.steps, seed=2)


if __name__ == "__main__":
    main()

"""Random choices for tests that draw many things together."""

from __future__ import annotations

import random
from typing import Any


class Choices:
    """They depend on nothing but the seed."""

    def __init__(self, seed: int) -> None:
        self.seed, self.random = seed, random.Random(seed)

    def often(self, probability: float) -> bool:
        return self.random.random() < probability

    def of(self, *choices: Any) -> Any:
        return self.random.choice(choices)

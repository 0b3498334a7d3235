"""How the native CUDA kernels share a row among threads, blocks and shared memory.

A row belongs to a *team*: ``threads_a_row`` threads of each of ``blocks_a_row`` blocks. A thread takes every
n-th vector of eight logits of both models and caches them in shared memory between the passes, as far as
there is room; the rest is read again (csrc/cuda/share.h). The figures are computed from the sizes of the
machines and have not been tuned on one.
"""

from functools import lru_cache
from typing import NamedTuple

# The constants of csrc/cuda/: logits of a vector, vectors under way to a thread, threads of a block, blocks
# of a cluster, and the bytes in which teams exchange their sums.
VECTOR = 8
AHEAD = 4
WARP = 32
MOST_THREADS = 512
MOST_BLOCKS = 8
EXCHANGE_BYTES = 2 * (MOST_THREADS // WARP + 1) * 8 * 4

# Threads of a block: several blocks share a multiprocessor, and while one waits or writes, another computes.
SMALL_BLOCK = 128
BLOCK = 256
# A multiprocessor that holds so many threads has enough loads under way.
BUSY_THREADS = 512
# What a block caches of a row where a cluster can hold all of it: three such blocks fit a multiprocessor.
CACHED_BYTES = 72 * 1024
KIB_A_MULTIPROCESSOR = {(8, 0): 164, (8, 7): 164, (9, 0): 228, (10, 0): 228, (10, 3): 228, (11, 0): 228}
RESERVED_BYTES = 1024  # of shared memory, a block
CACHE_FROM = 0.25  # the least share of a row that is worth caching


class TeamPlan(NamedTuple):
    """``threads_a_row`` threads in each of ``blocks_a_row`` blocks to a row, ``rows_a_block`` rows to a
    block, and room in shared memory for ``slots`` vectors of each model a thread."""

    threads_a_row: int
    rows_a_block: int
    blocks_a_row: int
    slots: int

    def cached(self, classes: int) -> float:
        """The share of a row that stays in shared memory between the passes, and so is read once."""
        needed = self._needed(classes)
        return 1.0 if needed <= self.slots else (self.slots - AHEAD) / needed

    def shared_bytes(self, element_bytes: int) -> int:
        """Shared memory of a block."""
        threads = self.threads_a_row * self.rows_a_block
        return EXCHANGE_BYTES + self.slots * threads * VECTOR * element_bytes

    def _needed(self, classes: int) -> int:
        return -(-vectors_of(classes) // (self.threads_a_row * self.blocks_a_row))

    def describe(self, classes: int) -> str:
        """The plan in words, for ``fastkd.explain``."""
        if self.rows_a_block > 1:
            return f"{self.rows_a_block} rows a block, {self.threads_a_row} threads a row, the row on chip"
        blocks = "one block" if self.blocks_a_row == 1 else f"a cluster of {self.blocks_a_row} blocks"
        cached = self.cached(classes)
        chip = "the row on chip" if cached == 1 else f"{cached:.0%} of the row on chip, the rest read again"
        return f"{blocks} of {self.threads_a_row} threads a row, {chip}"


def vectors_of(classes: int) -> int:
    """Vectors that a row touches, wherever between two boundaries it starts."""
    return (classes + VECTOR - 2) // VECTOR + 1


@lru_cache(maxsize=4096)
def plan_team(
    rows: int,
    classes: int,
    element_bytes: int,
    capability: tuple[int, int],
    multiprocessors: int,
    again: bool = True,
) -> TeamPlan:
    """The plan for ``rows`` rows of ``classes`` logits, of which student and teacher together take
    ``element_bytes`` bytes per class. ``again`` is False for a kernel of a single pass, which caches nothing.
    """
    vectors = vectors_of(classes)
    vector_bytes = VECTOR * element_bytes
    threads = min(BLOCK, _power_of_two(-(-vectors // AHEAD)))
    blocks = 1
    if capability >= (9, 0):
        while blocks < MOST_BLOCKS and blocks * CACHED_BYTES < vectors * vector_bytes and again:
            blocks *= 2
    # Few rows: more threads to each, and then more blocks, while every thread has a vector.
    while rows * threads * blocks < multiprocessors * BUSY_THREADS and threads * blocks < vectors:
        if threads < BLOCK:
            threads *= 2
        elif capability >= (9, 0) and blocks < MOST_BLOCKS:
            blocks *= 2
        else:
            break

    needed = -(-vectors // (threads * blocks))
    rows_a_block = 1
    if threads <= WARP:
        rows_a_block = SMALL_BLOCK // threads
        while rows_a_block * threads > WARP and rows < rows_a_block * multiprocessors:
            rows_a_block //= 2
    if not again:
        return TeamPlan(threads, rows_a_block, blocks, min(needed, AHEAD))
    if rows_a_block == 1 and needed * threads * vector_bytes > CACHED_BYTES:
        return _plan_long_row(vectors, vector_bytes, capability, blocks)
    return TeamPlan(threads, rows_a_block, blocks, needed)


def _plan_long_row(vectors: int, vector_bytes: int, capability: tuple[int, int], blocks: int) -> TeamPlan:
    """Two blocks to a multiprocessor if the row fits, else one that has all of its shared memory and, where
    its registers are of use, more threads."""
    whole = KIB_A_MULTIPROCESSOR.get(capability, 100) * 1024
    for threads, share in ((BLOCK, whole // 2), (MOST_THREADS, whole), (BLOCK, whole)):
        needed = -(-vectors // (threads * blocks))
        slots = (share - RESERVED_BYTES - EXCHANGE_BYTES) // (threads * vector_bytes)
        if needed <= slots:
            return TeamPlan(threads, 1, blocks, needed)
    # It does not fit. Caching a small part would cost more, in blocks that overlap, than it saves.
    return TeamPlan(threads, 1, blocks, slots if slots - AHEAD >= CACHE_FROM * needed else AHEAD)


def _power_of_two(n: int) -> int:
    """The least that is not below ``n``."""
    return 1 << max(0, n - 1).bit_length()

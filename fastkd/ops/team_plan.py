"""How the native CUDA kernels distribute a row over threads, blocks and shared memory.

A row is computed by a *team*: ``threads_per_row`` threads in each of ``blocks_per_row`` blocks. A thread
takes every n-th vector of eight logits of both models and caches as many of them in shared memory between the
passes as fit; the others are read again (csrc/cuda/share.h). The constants are computed from hardware limits,
not tuned by measurement.
"""

from functools import lru_cache
from typing import NamedTuple

# The constants of csrc/cuda/: logits per vector, vectors in flight per thread, limits of blocks and clusters,
# and the shared memory through which teams exchange their sums.
VECTOR = 8
STAGES = 4
WARP = 32
MAX_THREADS = 512
MAX_BLOCKS = 8
EXCHANGE_BYTES = 2 * (MAX_THREADS // WARP + 1) * 8 * 4

# Threads per block, small enough for several blocks per multiprocessor, whose waiting and computing overlap.
SMALL_BLOCK = 128
BLOCK = 256
# Threads per multiprocessor that keep enough loads in flight.
BUSY_THREADS = 512
# What a block caches at most if a cluster can hold the whole row: leaves room for three blocks per
# multiprocessor.
CACHED_BYTES = 72 * 1024
KIB_PER_MULTIPROCESSOR = {(8, 0): 164, (8, 7): 164, (9, 0): 228, (10, 0): 228, (10, 3): 228, (11, 0): 228}
RESERVED_BYTES = 1024  # of shared memory, per block
MIN_CACHED_SHARE = 0.25  # of a row: less is not worth caching


class TeamPlan(NamedTuple):
    """Launch dimensions; ``slots`` is the number of vectors of each model per thread in shared memory."""

    threads_per_row: int
    rows_per_block: int
    blocks_per_row: int
    slots: int

    def cached(self, classes: int) -> float:
        """The fraction of a row that stays in shared memory between the passes."""
        needed = self._needed(classes)
        return 1.0 if needed <= self.slots else (self.slots - STAGES) / needed

    def shared_bytes(self, element_bytes: int) -> int:
        """Shared memory per block."""
        threads = self.threads_per_row * self.rows_per_block
        return EXCHANGE_BYTES + self.slots * threads * VECTOR * element_bytes

    def _needed(self, classes: int) -> int:
        return -(-vectors_of(classes) // (self.threads_per_row * self.blocks_per_row))

    def describe(self, classes: int) -> str:
        """The plan in words, for ``fastkd.explain``."""
        if self.rows_per_block > 1:
            teams = f"{self.rows_per_block} rows per block, {self.threads_per_row} threads per row"
            return f"{teams}, the row on chip"
        blocks = "one block" if self.blocks_per_row == 1 else f"a cluster of {self.blocks_per_row} blocks"
        cached = self.cached(classes)
        chip = "the row on chip" if cached == 1 else f"{cached:.0%} of the row on chip, the rest read again"
        return f"{blocks} of {self.threads_per_row} threads per row, {chip}"


def vectors_of(classes: int) -> int:
    """The most vectors that a row can span, whatever its alignment."""
    return (classes + VECTOR - 2) // VECTOR + 1


@lru_cache(maxsize=4096)
def plan_team(
    rows: int,
    classes: int,
    element_bytes: int,
    capability: tuple[int, int],
    multiprocessors: int,
    rereads: bool = True,
) -> TeamPlan:
    """The plan for ``rows`` rows. ``element_bytes`` are the bytes per class of student and teacher together;
    ``rereads`` is False for single-pass kernels, which cache nothing.
    """
    vectors = vectors_of(classes)
    vector_bytes = VECTOR * element_bytes
    threads = min(BLOCK, _power_of_two(-(-vectors // STAGES)))
    blocks = 1
    if capability >= (9, 0):
        while blocks < MAX_BLOCKS and blocks * CACHED_BYTES < vectors * vector_bytes and rereads:
            blocks *= 2
    # Few rows: more threads per row, then more blocks per row, as long as every thread has a vector.
    while rows * threads * blocks < multiprocessors * BUSY_THREADS and threads * blocks < vectors:
        if threads < BLOCK:
            threads *= 2
        elif capability >= (9, 0) and blocks < MAX_BLOCKS:
            blocks *= 2
        else:
            break

    needed = -(-vectors // (threads * blocks))
    rows_per_block = 1
    if threads <= WARP:
        rows_per_block = SMALL_BLOCK // threads
        while rows_per_block * threads > WARP and rows < rows_per_block * multiprocessors:
            rows_per_block //= 2
    if not rereads:
        return TeamPlan(threads, rows_per_block, blocks, min(needed, STAGES))
    if rows_per_block == 1 and needed * threads * vector_bytes > CACHED_BYTES:
        return _plan_long_row(vectors, vector_bytes, capability, blocks)
    return TeamPlan(threads, rows_per_block, blocks, needed)


def _plan_long_row(vectors: int, vector_bytes: int, capability: tuple[int, int], blocks: int) -> TeamPlan:
    """Two blocks per multiprocessor if the row then fits, else one with all of its shared memory."""
    whole = KIB_PER_MULTIPROCESSOR.get(capability, 100) * 1024
    for threads, share in ((BLOCK, whole // 2), (MAX_THREADS, whole), (BLOCK, whole)):
        needed = -(-vectors // (threads * blocks))
        slots = (share - RESERVED_BYTES - EXCHANGE_BYTES) // (threads * vector_bytes)
        if needed <= slots:
            return TeamPlan(threads, 1, blocks, needed)
    # The row does not fit. Caching a small part costs more, in occupancy, than it saves.
    return TeamPlan(threads, 1, blocks, slots if slots - STAGES >= MIN_CACHED_SHARE * needed else STAGES)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()

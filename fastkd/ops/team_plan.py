"""How the native CUDA kernels distribute a row over threads, blocks and shared memory.

A row is computed by a *team*: ``threads_per_row`` threads in each of ``blocks_per_row`` blocks. A thread
takes every n-th vector of eight logits of both models and caches as many of them in shared memory between the
passes as fit; the others are read again (csrc/cuda/share.h). Measured on an H200: what a thread does once per
row, and the exchange between blocks, cost more than reading a row twice. So a thread has many vectors, and a
row few blocks.
"""

from functools import lru_cache
from typing import NamedTuple

# The constants of csrc/cuda/: logits per vector, vectors in flight per thread, limits of blocks and clusters,
# and the shared memory through which teams exchange their sums.
VECTOR = 8
STAGES = 4
WARP = 32
MAX_THREADS = 512
# The largest portable cluster. The kernels take 16, which benchmarks/plans.py tries: never run on a GPU.
MAX_BLOCKS = 8
EXCHANGE_BYTES = 2 * (MAX_THREADS // WARP + 1) * 8 * 4

# Vectors per thread: of a row in one block, and of each block if there are several.
VECTORS_PER_THREAD = 8
VECTORS_PER_CLUSTER_THREAD = 16
# Threads per block, small enough for several blocks per multiprocessor, whose waiting and computing overlap.
SMALL_BLOCK = 128
BLOCK = 256
# Of a multiprocessor's shared memory a block takes at most one of so many parts.
BLOCKS_PER_MULTIPROCESSOR = 3
# Threads per multiprocessor: few rows are spread over more threads and blocks until there are so many.
BUSY_THREADS = 256
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
    threads = min(BLOCK, _power_of_two(vectors // VECTORS_PER_THREAD))
    blocks = 1
    if capability >= (9, 0):
        while blocks < MAX_BLOCKS and vectors >= 2 * blocks * BLOCK * VECTORS_PER_CLUSTER_THREAD and rereads:
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
    whole = KIB_PER_MULTIPROCESSOR.get(capability, 100) * 1024
    room = whole // BLOCKS_PER_MULTIPROCESSOR - RESERVED_BYTES - EXCHANGE_BYTES
    slots = room // (rows_per_block * threads * vector_bytes)
    if needed > slots and slots - STAGES < MIN_CACHED_SHARE * needed:
        slots = STAGES  # caching a small part costs more, in occupancy, than it saves
    return TeamPlan(threads, rows_per_block, blocks, min(needed, slots))


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()

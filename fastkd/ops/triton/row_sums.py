"""The sum over rows in the launch that computes them: the last program to finish sums what all have stored.

Programs take tickets from a counter, which is 0 between launches. The order of the sum does not depend on the
order in which they finish.
"""

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

# Up to this many rows of a pair: one program sums more of them slowly.
MOST_ROWS = 1024
# Counters per device, and of a stream: one for each pair.
COUNTERS, MOST_PAIRS = 16384, 64


@triton.jit
def sum_rows(
    reduction,
    loss_pointer,
    terms_pointer,
    count,
    values,
    TERMS: tl.constexpr,
    TILE: tl.constexpr = 256,
):
    """Sum the row losses of a pair, ``values`` numbers, and its terms, if all others have stored theirs.

    ``reduction``: pointers to the counters, and to the sums of losses [H] and terms [K, H].
    """
    counters, loss_sums, term_sums = reduction
    pair, pairs = tl.program_id(2), tl.num_programs(2)
    tl.debug_barrier()  # all threads have stored before one of them takes the ticket
    ticket = tl.atomic_add(counters + pair, 1, sem="acq_rel", scope="gpu")
    if ticket == tl.num_programs(0) * tl.num_programs(1) - 1:
        first = pair.to(tl.int64) * values
        tl.store(loss_sums + pair, sum_of(loss_pointer + first, values, TILE))
        if TERMS:
            for term in tl.static_range(4):
                start = (term * pairs + pair).to(tl.int64) * count
                tl.store(term_sums + term * pairs + pair, sum_of(terms_pointer + start, count, TILE))
        tl.store(counters + pair, 0)


@triton.jit
def sum_of(pointer, count, TILE: tl.constexpr):
    total = tl.zeros((TILE,), tl.float32)
    for first in range(0, count, TILE):
        index = first + tl.arange(0, TILE)
        # From L2: other multiprocessors have stored them.
        total += tl.load(pointer + index, mask=index < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total)


class _Pool:
    """The counters of a device."""

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # ordinary tensors, whatever the first loss runs in
            self.counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        self.given = 0
        self.of_streams: dict[int, Tensor | None] = {}
        if self.counters.is_cuda:
            # Other streams do not wait for the zeros. Once per device, when kernels are compiled anyway.
            torch.cuda.current_stream(device).synchronize()

    def take(self, count: int) -> Tensor | None:
        """Counters that are given to nobody else, or None if not enough are left."""
        with _lock:
            first = self.given
            if first + count > COUNTERS:
                return None
            self.given += -(-count // 4) * 4  # keeps the alignment on which kernels are specialised
        return self.counters[first : first + count]


_pools: dict[torch.device, _Pool] = {}
_lock = threading.RLock()


def counters_of(rows: Tensor, pairs: int) -> Tensor | None:
    """A counter for each pair of a launch on the current stream, or None if there is none left.

    ``rows`` is on the current device. Launches on a stream follow one another and share the stream's
    counters. A captured graph may replay beside others, so each captured launch has counters of its own; they
    need no node that sets them to 0.
    """
    device = rows.device
    capturing = rows.is_cuda and torch.cuda.is_current_stream_capturing()
    pool = _pools.get(device)
    if pool is None:
        if capturing:
            return None  # nothing can be set to 0 now but at every replay
        with _lock:
            pool = _pools.get(device) or _pools.setdefault(device, _Pool(device))
    if capturing:
        return pool.take(pairs)
    stream = torch._C._cuda_getCurrentRawStream(device.index) if rows.is_cuda else 0
    if stream not in pool.of_streams:
        pool.of_streams[stream] = pool.take(MOST_PAIRS)
    return pool.of_streams[stream] if pairs <= MOST_PAIRS else None

"""How the Triton kernels compute a loss of given size: tiles, warps, programs to a row."""

from functools import cache
from typing import Literal, NamedTuple

import torch

from fastkd.ops.spec import Family

# A row of this many classes still fits into the registers of one program: every logit is read once.
RESIDENT_CLASSES = 8192
# The same for standardised logits, whose moments and further sums take registers of their own.
RESIDENT_STANDARDIZED = 4096
# Sixteen warps: with eight the standardised losses spill registers on sm_80 (tools/compile_kernels.py).
STREAMED_TILE = 4096
STREAMED_WARPS = 16
# Logits of a row that one warp works on; shorter rows share a program of up to four warps.
ELEMENTS_A_WARP = 512
# Of the second-level cache, what the rows in flight may fill between their two passes.
CACHE_SHARE = 0.6
MAX_PARTS = 128

ELEMENT_BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2, torch.float64: 8}


class Device(NamedTuple):
    """What the planner wants to know of a GPU."""

    multiprocessors: int
    cache_bytes: int
    capability: tuple[int, int] = (9, 0)


class Plan(NamedTuple):
    """How the Triton kernels share out rows; the numbers of programs do not change the compiled kernel."""

    rows: int  # to a program
    tile: int
    one_tile: bool
    warps: int
    parts: int  # programs to a row
    programs: int  # of one part of the rows, at most


@cache
def device_of(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(132, 50 << 20)  # Triton's interpreter: planned as for an H100
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    return Device(properties.multi_processor_count, properties.L2_cache_size, capability)


def plan_rows(
    family: Family | Literal["scale"],
    rows: int,
    classes: int,
    element_bytes: int,
    device: Device,
    standardized: bool = False,
) -> Plan:
    """Rows that fit on chip are read once (3 accesses per element); longer ones take two passes (5).

    ``family`` is a loss's, or "scale" for the scaling of a gradient. The kernel that is compiled depends on
    ``family`` and ``classes`` alone, not on the number of rows.
    """
    resident = family == "softmax"
    longest = RESIDENT_CLASSES if resident else STREAMED_TILE
    if standardized:
        longest = RESIDENT_STANDARDIZED
    if classes <= longest:
        tile = max(16, 1 << (classes - 1).bit_length())
        together = 1 if family == "scale" else max(1, ELEMENTS_A_WARP // tile)
        # Half as many logits a warp where a class costs more arithmetic, hence more registers.
        a_warp = ELEMENTS_A_WARP if resident else ELEMENTS_A_WARP // 2
        warps = min(4, together) if together > 1 else min(16, max(1, tile // a_warp))
        return Plan(together, tile, resident, warps, 1, rows)
    tiles = -(-classes // STREAMED_TILE)
    parts = 1
    if rows < device.multiprocessors:
        parts = min(tiles, MAX_PARTS, -(-2 * device.multiprocessors // max(rows, 1)))
    cached_rows = int(CACHE_SHARE * device.cache_bytes) // (2 * classes * element_bytes)
    programs = max(device.multiprocessors, cached_rows)
    return Plan(1, STREAMED_TILE, False, STREAMED_WARPS, parts, programs)

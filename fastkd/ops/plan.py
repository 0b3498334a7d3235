"""How the Triton kernels distribute a loss over tiles, warps and programs."""

from functools import cache
from typing import Literal, NamedTuple

import torch

from fastkd.ops.spec import Family

# The longest row that fits into the registers of one program, so that every logit is read once.
RESIDENT_CLASSES = 8192
# The same for standardised logits, whose moments and additional sums take registers too.
RESIDENT_STANDARDIZED = 4096
# Sixteen warps: with eight, the standardised losses spill registers on sm_80 (tools/compile_kernels.py).
LONGEST_TILE = 4096
STREAMED_WARPS = 16
# Of these warps, on a multiprocessor: at 64 registers per thread (launch_options.py).
STREAMED_PROGRAMS = 2
# What a thread loads at once.
LANE_BYTES = 16
# Logits per warp; rows shorter than this share a program of up to four warps.
ELEMENTS_PER_WARP = 512
# Eight logits per thread: those of a wide load of half precision.
KNOWN_TILE = 2048
KNOWN_PER_WARP = 256
# The fraction of the L2 cache that rows in flight may fill between their two passes.
CACHE_SHARE = 0.6
MAX_PARTS = 128

ELEMENT_BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2, torch.float64: 8}


class Device(NamedTuple):
    """The properties of a GPU that the planners use."""

    multiprocessors: int
    cache_bytes: int
    capability: tuple[int, int] = (9, 0)


class Plan(NamedTuple):
    """Launch dimensions of a Triton kernel; ``parts`` and ``programs`` do not change the compiled kernel."""

    rows: int  # per program
    tile: int
    one_tile: bool
    warps: int
    parts: int  # programs per row
    programs: int  # the most in the grid's first dimension, per pair


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
    pairs: int = 1,
) -> Plan:
    """The plan for ``rows`` rows of ``pairs`` pairs together: those that fit on chip are read once, longer
    ones take two passes.

    ``family`` is a loss's, or "scale" for the scaling of a gradient. The compiled kernel does not depend on
    the number of rows.
    """
    resident = family == "softmax"
    longest = RESIDENT_CLASSES if resident else LONGEST_TILE
    if standardized:
        longest = RESIDENT_STANDARDIZED
    if classes <= longest:
        tile = max(16, 1 << (classes - 1).bit_length())
        rows_per_program = 1 if family == "scale" else max(1, ELEMENTS_PER_WARP // tile)
        # Half as many logits per warp where a class needs more arithmetic, hence more registers.
        per_warp = ELEMENTS_PER_WARP if resident else ELEMENTS_PER_WARP // 2
        warps = min(4, rows_per_program) if rows_per_program > 1 else min(16, max(1, tile // per_warp))
        return Plan(rows_per_program, tile, resident, warps, 1, rows)
    # What each thread loads at once: more would need more registers.
    tile = LANE_BYTES // element_bytes * 32 * STREAMED_WARPS
    tiles = -(-classes // tile)
    parts = 1
    if rows < device.multiprocessors:
        parts = min(tiles, MAX_PARTS, -(-2 * device.multiprocessors // max(rows, 1)))
    # As many rows at a time as stay in the cache between two passes; if that leaves multiprocessors without a
    # row, as many as are resident.
    cached_rows = int(CACHE_SHARE * device.cache_bytes) // (2 * classes * element_bytes)
    if cached_rows < device.multiprocessors:
        cached_rows = STREAMED_PROGRAMS * device.multiprocessors
    programs = max(1, cached_rows // pairs)
    return Plan(1, tile, False, STREAMED_WARPS, parts, programs)


def plan_known(rows: int, classes: int, device: Device) -> Plan:
    """The plan of each pass over a student whose teacher is known at K classes; a pass is a launch.

    A program has one row or a part of it. Parts cost little: a later launch combines their sums anyway.
    """
    tile = min(KNOWN_TILE, max(16, 1 << (classes - 1).bit_length()))
    tiles = -(-classes // tile)
    warps = max(1, tile // KNOWN_PER_WARP)
    # Twice the programs that the device holds at 2,048 threads per multiprocessor.
    programs = 2 * device.multiprocessors * (2048 // (32 * warps))
    return Plan(1, tile, False, warps, min(tiles, MAX_PARTS, max(1, -(-programs // rows))), rows)

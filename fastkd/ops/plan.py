"""How the Triton kernels distribute a loss over tiles, warps and programs."""

from functools import cache
from typing import NamedTuple

import torch

from fastkd.ops.spec import Family, Needs

# What a load of a thread takes.
LANE_BYTES = 16
# Eight logits per thread: those of a wide load of half precision.
KNOWN_TILE = 2048
KNOWN_PER_WARP = 256
# The most rows that share a warp: a row has its own statistics, which ptxas spills of 8 to 32 rows.
WARP_ROWS = 4
MAX_PARTS = 128

ELEMENT_BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2, torch.float64: 8}


class Device(NamedTuple):
    """The properties of a GPU that the planners use."""

    multiprocessors: int
    capability: tuple[int, int] = (9, 0)


class Kind(NamedTuple):
    """How programs go through rows, as measured on an H200, but for the short rows of mixtures and of one
    model: their logits per warp were chosen by counts of instructions and not timed.

    A row of at most ``longest`` classes is one tile; if ``resident``, it is read once and stays in registers.
    Fewer logits per warp leave a larger share to what a warp does once per row; more leave too few warps on a
    multiprocessor, for the arithmetic of labels and moments takes registers too. Longer rows are streamed:
    two loads of each model per thread and tile spare instructions of the loop, where the registers suffice.
    """

    longest: int
    resident: bool
    per_warp: int  # logits of a row in one tile
    warps: int  # of a program that streams rows
    loads: int  # of a thread, per model and tile
    registers: int | None  # per thread, at most, for a program that streams rows
    programs: int  # of them that fit on a multiprocessor


KINDS = {
    "softmax": Kind(8192, True, 1024, 8, 2, 80, 3),
    "labelled": Kind(8192, True, 1024, 8, 2, 80, 3),
    "one model": Kind(8192, True, 1024, 8, 1, 80, 3),
    "cross-entropy": Kind(8192, True, 512, 8, 1, 80, 3),
    "standardized": Kind(4096, True, 512, 8, 2, 128, 2),
    "mixture": Kind(4096, True, 512, 16, 1, 128, 1),
    "pointwise": Kind(4096, False, 512, 4, 2, None, 5),
    "scale": Kind(4096, False, 512, 4, 2, None, 5),
}


@cache
def kind_of(family: Family, needs: int) -> str:
    """The kind of a loss's kernel, one of ``KINDS``."""
    if family != "softmax":
        return family
    if needs & Needs.STANDARDIZED:
        return "standardized"
    if not needs & Needs.DISTILLS:
        return "one model"  # a cross-entropy alone
    if needs & (Needs.CROSS_ENTROPY | Needs.CROSS_TERM):
        return "cross-entropy"
    return "labelled" if needs & Needs.LABELLED else "softmax"


# The fewest classes from which the native CUDA kernels are faster than Triton's: of the softmax family
# without and with labels, and of mixtures. Measured on an H200 (docs/speed/gpu.md).
NATIVE_CLASSES: dict[tuple[Family, bool], int] = {
    ("softmax", False): 8193, ("softmax", True): 4097, ("mixture", False): 4097,
}  # fmt: skip
# What it was measured with: other dtypes, models of two dtypes and other devices stay with Triton.
NATIVE_DTYPE, NATIVE_CAPABILITY = torch.bfloat16, (9, 0)
# Fewer leave multiprocessors without a row, which Triton's split rows do not: 64 are faster with it, 128 not.
NATIVE_ROWS = 128


def native_is_faster(family: Family, labelled: bool, rows: int, classes: int, dtype: torch.dtype) -> bool:
    """Whether to prefer the native kernels to Triton's on a GPU of ``NATIVE_CAPABILITY``."""
    fewest = NATIVE_CLASSES.get((family, labelled))
    return fewest is not None and classes >= fewest and rows >= NATIVE_ROWS and dtype == NATIVE_DTYPE


class Plan(NamedTuple):
    """Launch dimensions of a Triton kernel; ``parts`` and ``programs`` do not change the compiled kernel."""

    rows: int  # per program
    tile: int
    one_tile: bool
    warps: int
    registers: int | None  # per thread, at most
    parts: int  # programs per row
    programs: int  # the most in the grid's first dimension, per pair


@cache
def device_of(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(132)  # Triton's interpreter: planned as for an H100
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    return Device(properties.multi_processor_count, capability)


def plan_rows(kind: str, rows: int, classes: int, element_bytes: int, device: Device, pairs: int = 1) -> Plan:
    """The plan for ``rows`` rows of ``pairs`` pairs together; ``kind`` is one of ``KINDS``.

    The compiled kernel does not depend on the number of rows.
    """
    of = KINDS[kind]
    if of.resident and device.capability >= (10, 0):
        # ptxas needs more registers there (tools/compile_kernels.py).
        of = of._replace(loads=1, registers=max(96, of.registers or 0), programs=min(2, of.programs))
    if classes <= of.longest:
        tile = max(16, 1 << (classes - 1).bit_length())
        # ptxas would spill a few of these in float32.
        halved = kind in ("labelled", "one model") and element_bytes > 2
        per_warp = of.per_warp // 2 if halved else of.per_warp
        # A warp that shares its threads between rows has more numbers per row, so half the logits.
        rows_per_program = 1 if kind == "scale" else max(1, min(per_warp // 2 // tile, WARP_ROWS))
        warps = max(1, tile // per_warp)
        return Plan(rows_per_program, tile, of.resident, warps, None, 1, rows)
    # As many rows at a time on each multiprocessor. More than stay in the L2 cache between two passes cost
    # less than multiprocessors that wait.
    programs = of.programs * device.multiprocessors
    tile = of.loads * (LANE_BYTES // element_bytes) * 32 * of.warps
    parts = 1
    # Parts of a loss with statistics take a launch more: there only if multiprocessors would have no row.
    if rows < (device.multiprocessors if of.resident else programs):
        tiles = -(-classes // tile)
        parts = min(tiles, MAX_PARTS, max(1, programs // max(rows, 1)))
        parts = -(-tiles // -(-tiles // parts))  # of equal length
    return Plan(1, tile, False, of.warps, of.registers, parts, max(1, programs // pairs))


def plan_known(rows: int, classes: int, device: Device) -> Plan:
    """The plan of each pass over a student whose teacher is known at K classes; a pass is a launch.

    A program has one row or a part of it. Parts cost little: a later launch combines their sums anyway.
    """
    tile = min(KNOWN_TILE, max(16, 1 << (classes - 1).bit_length()))
    tiles = -(-classes // tile)
    warps = max(1, tile // KNOWN_PER_WARP)
    # Twice the programs that the device holds at 2,048 threads per multiprocessor.
    programs = 2 * device.multiprocessors * (2048 // (32 * warps))
    return Plan(1, tile, False, warps, None, min(tiles, MAX_PARTS, max(1, -(-programs // rows))), rows)

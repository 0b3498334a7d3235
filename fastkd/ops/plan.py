"""Which tile and how many warps a Triton kernel takes for rows of so many classes."""

from typing import NamedTuple

# A row of this many classes still fits into the registers of one program: every logit is read once.
RESIDENT_CLASSES = 8192
STREAMED_TILE = 4096


class Plan(NamedTuple):
    tile: int
    one_tile: bool
    warps: int


def plan_rows(classes: int) -> Plan:
    """One tile where the row fits on chip (3 accesses an element), else two sweeps of tiles (5)."""
    if classes <= RESIDENT_CLASSES:
        tile = max(16, 1 << (classes - 1).bit_length())
        return Plan(tile, True, min(16, max(1, tile // 512)))
    return Plan(STREAMED_TILE, False, 8)


def plan_tile(classes: int) -> tuple[int, int]:
    """Tile and warps of a kernel that walks along the row."""
    plan = plan_rows(min(classes, STREAMED_TILE))
    return plan.tile, plan.warps

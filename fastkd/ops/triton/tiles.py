"""What every row kernel does with tiles of logits: choose the rows, load, weigh, store.

A program works on tiles of ``[ROWS, TILE]``: a number that belongs to a row is a ``[ROWS, 1]`` tensor. A long
row may be shared by ``parts`` programs, each of which walks along its own tiles.
"""

import triton
import triton.language as tl

# Below this a logit is a masked class; see MASKED in fastkd/reference.py.
MASKED = tl.constexpr(-1e30)


@triton.jit
def of_pair(pointers, pair):
    """The pointer of one pair of logits among those of the launch."""
    chosen = pointers[0]
    for other in tl.static_range(1, len(pointers)):
        if pair == other:
            chosen = pointers[other]
    return chosen


@triton.jit
def rows_of_block(block, count, ROWS: tl.constexpr):
    """Indices [ROWS, 1] of a block of rows, and which of them exist."""
    index = block * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    return index, index < count


@triton.jit
def tiles_of_part(part, parts, classes, TILE: tl.constexpr):
    """First tile of a part of the row, and the one after its last."""
    tiles = tl.cdiv(classes, TILE)
    each = tl.cdiv(tiles, parts)
    return part * each, tl.minimum((part + 1) * each, tiles)


@triton.jit
def load_logits(rows, columns, classes, exists, EVICT: tl.constexpr):
    """A tile of logits in float32; beyond the row's end, and below MASKED (-inf), it is a masked class."""
    inside = (columns < classes) & exists
    logits = tl.load(rows + columns, mask=inside, other=float("-inf"), eviction_policy=EVICT)
    logits = logits.to(tl.float32)
    return tl.where(logits < MASKED, MASKED, logits)  # unlike a maximum, keeps a NaN


@triton.jit
def weight_of_rows(weight_pointer, index, exists, scale, WEIGHTED: tl.constexpr):
    weight = tl.where(exists, scale, 0.0)
    if WEIGHTED:
        weight *= tl.load(weight_pointer + index, mask=exists, other=0.0)
    return weight


@triton.jit
def store_tile(rows, columns, classes, exists, value, weight, bad_label):
    """A row left out has no gradient, one with a label out of range an undefined one."""
    value = tl.where(weight == 0.0, 0.0, tl.where(bad_label, float("nan"), value))
    tl.store(rows + columns, value.to(rows.dtype.element_ty), mask=(columns < classes) & exists)

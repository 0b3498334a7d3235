"""What every row kernel does with a tile: load logits, weigh the row, store a gradient."""

import triton
import triton.language as tl

# Below this a logit is a masked class; see MASKED in fastkd/reference.py.
MASKED = tl.constexpr(-1e30)


@triton.jit
def load_logits(row, columns, classes, EVICT: tl.constexpr):
    """A tile of logits in float32; beyond the row's end, and below MASKED (-inf), it is a masked class."""
    logits = tl.load(row + columns, mask=columns < classes, other=float("-inf"), eviction_policy=EVICT)
    logits = logits.to(tl.float32)
    return tl.where(logits < MASKED, MASKED, logits)  # unlike a maximum, keeps a NaN


@triton.jit
def row_weight(weight_pointer, row, scale, WEIGHTED: tl.constexpr):
    if WEIGHTED:
        return scale * tl.load(weight_pointer + row)
    else:
        return scale + 0.0


@triton.jit
def store_tile(row, columns, classes, value, weight, bad_label):
    """A row left out has no gradient, one with a label out of range an undefined one."""
    value = tl.where(weight == 0.0, 0.0, tl.where(bad_label, float("nan"), value))
    tl.store(row + columns, value.to(row.dtype.element_ty), mask=columns < classes)

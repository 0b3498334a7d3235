"""Functions of a row's known classes, for the kernels of top_k_rows.py."""

import triton
import triton.language as tl

from fastkd.ops.triton.statistics import LOG2E, OWN_SLOPES

NO_INDEX = tl.constexpr(2**31 - 1)


@triton.jit
def temperature_of(numbers, NEEDS: tl.constexpr):
    """The student's. With OWN_SLOPES (TTM) the first option is the teacher's."""
    return 1.0 if OWN_SLOPES & NEEDS else numbers[0]


@triton.jit
def slope_of(numbers, NEEDS: tl.constexpr):
    """log2(e) / T, for e^(z / T) as a power of 2."""
    return LOG2E if OWN_SLOPES & NEEDS else tl.div_rn(LOG2E, numbers[0])


@triton.jit
def places_of(TILE: tl.constexpr, V: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets [V, TILE / V] in a tile: with wide loads a thread's V classes are adjacent, without those of
    neighbouring threads are."""
    within = tl.arange(0, V)[:, None]
    thread = tl.arange(0, TILE // V)[None, :]
    if VECTOR > 1:
        return thread * V + within
    else:
        return within * (TILE // V) + thread


@triton.jit
def hide(hidden, place, TILE: tl.constexpr, V: tl.constexpr, VECTOR: tl.constexpr):
    """Set the bit of the class at ``place`` in ``hidden`` [1, TILE / V], which has a bit per class of a
    thread: an index costs three instructions per V classes, a comparison with each class would cost 2 V."""
    if VECTOR > 1:
        thread = place // V
        bit = place % V
    else:
        thread = place % (TILE // V)
        bit = place // (TILE // V)
    return hidden | tl.where(tl.arange(0, TILE // V)[None, :] == thread, 1 << bit, 0)


@triton.jit
def first_known(indices, known, column):
    """How many of the sorted indices are below ``column``."""
    low = known * 0
    high = known
    while low < high:
        middle = (low + high) // 2
        below = tl.load(indices + middle) < column
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def load_index(indices, at, known):
    return tl.load(indices + at, mask=at < known, other=NO_INDEX).to(tl.int32)


@triton.jit
def label_of(target_pointer, target_stride, row, classes, READ: tl.constexpr):
    """The label, -1 if it is out of range or not read, and whether it is out of range."""
    label = classes * 0 - 1
    bad_label = label > 0
    if READ:
        target = tl.load(target_pointer + row * target_stride)
        bad_label = (target < 0) | (target >= classes)
        label = tl.where(bad_label, -1, target).to(tl.int32)
    return label, bad_label

"""The generalised Jensen-Shannon divergence."""

import triton
import triton.language as tl

from fastkd.ops.triton.softmax_rows import update_statistics
from fastkd.ops.triton.tiles import MASKED, load_logits, row_weight, store_tile


@triton.jit
def times_log_ratio(x, m):
    """x log(x / m) of probabilities; 0 at x = 0."""
    positive = x > 0
    return x * tl.log(tl.where(positive, x, 1.0) / tl.where(positive, m, 1.0))


@triton.jit
def mixture_tile(student, teacher, maxima, scales, slope, beta):
    """q, q log(q / m) and p log(p / m) of a tile, m = beta p + (1 - beta) q."""
    max_s, max_t = maxima
    scale_s, scale_t = scales
    q = tl.exp((student - max_s) * slope) * scale_s
    p = tl.exp((teacher - max_t) * slope) * scale_t
    # m from the difference: at p = q it is q exactly, and both logarithms are 0.
    m = tl.where(beta <= 0.5, q + beta * (p - q), p - (1.0 - beta) * (p - q))
    return q, times_log_ratio(q, m), times_log_ratio(p, m)


@triton.jit
def jsd_rows(
    student_pointer,
    teacher_pointer,
    weight_pointer,
    loss_pointer,
    gradient_pointer,
    classes,
    student_stride,
    teacher_stride,
    gradient_stride,
    scale,
    slope,
    beta,
    WEIGHTED: tl.constexpr,
    GRADIENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """beta KL(p || m) + (1 - beta) KL(q || m) of row ``program_id(0)``. The mixture needs both distributions
    normalised first, so a row is swept three times; a short one comes from cache the second and third."""
    row = tl.program_id(0).to(tl.int64)
    student_row = student_pointer + row * student_stride
    teacher_row = teacher_pointer + row * teacher_stride
    gradient_row = gradient_pointer + row * gradient_stride
    weight = row_weight(weight_pointer, row, scale, WEIGHTED)
    common = (slope, 0.0, 0.0)
    lowest = tl.full((), MASKED, tl.float32)
    sums = (lowest, 0.0, 0.0, 0.0, 0.0, lowest, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    for start in range(0, classes, TILE):
        columns = start + tl.arange(0, TILE)
        student = load_logits(student_row, columns, classes, "evict_last")
        teacher = load_logits(teacher_row, columns, classes, "evict_last")
        sums = update_statistics(
            sums, student, teacher, columns, -1, classes, common, common,
            True, False, False, False, False, False, False, False,
        )  # fmt: skip
    max_s, sum_s, dot_s, moment_s, plain_s, max_t, sum_t, dot_t, moment_t, entropy_t, plain_t, total = sums
    maxima = (max_s, max_t)
    scales = (1.0 / sum_s, 1.0 / sum_t)
    student_kl = 0.0
    teacher_kl = 0.0
    for start in range(0, classes, TILE):
        columns = start + tl.arange(0, TILE)
        student = load_logits(student_row, columns, classes, "evict_last")
        teacher = load_logits(teacher_row, columns, classes, "evict_last")
        q, q_log, p_log = mixture_tile(student, teacher, maxima, scales, slope, beta)
        student_kl += tl.sum(q_log)
        teacher_kl += tl.sum(p_log)
    loss = beta * teacher_kl + (1.0 - beta) * student_kl
    tl.store(loss_pointer + row, tl.where(weight == 0.0, 0.0, weight * loss))
    if GRADIENT:
        for start in range(0, classes, TILE):
            columns = start + tl.arange(0, TILE)
            student = load_logits(student_row, columns, classes, "evict_first")
            teacher = load_logits(teacher_row, columns, classes, "evict_first")
            q, q_log, p_log = mixture_tile(student, teacher, maxima, scales, slope, beta)
            value = weight * (1.0 - beta) * slope * (q_log - q * student_kl)
            store_tile(gradient_row, columns, classes, value, weight, False)

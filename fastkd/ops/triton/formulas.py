"""The formulas of the losses, by their names in ``ops/spec.py``.

The same as in ``csrc/row_formulas.h``, in float32 throughout; docs/formulas.md derives them. Options are
passed as a tuple of numbers, in the order of the NamedTuple that each formula builds.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.ops.spec import JSDOptions, NKDOptions, SkewOptions, SoftmaxOptions, TTMOptions
from fastkd.ops.triton.scalar_math import (
    binary_divergence,
    expm1_of_negative,
    from_log_odds,
    log1p_of_negative,
    log_ratio,
    reciprocal,
    twice_atanh,
)
from fastkd.ops.triton.statistics import CROSS_ENTROPY, DISTILLS, LABELLED, LOG2E, STANDARDIZED

# ---- the softmax family --------------------------------------------------------------------------------


class Row(NamedTuple):
    """Inputs of the formulas of the softmax family."""

    sums: Any  # Statistics
    slopes: Any  # Pair of 1 / T
    label: Any  # Pair of the label's logits
    deviation: Any  # of standardised logits
    label_above_mean: Any
    classes: Any


class Gradient(NamedTuple):
    """g_i = student e^{a_i / T} - teacher e^{b_i / T} + student_t1 e^{a_i} + constant + affine (z_i - mean),
    and g_y = label; a and b as in statistics.py. ``excess`` is student - teacher without cancellation.

    With LOG_RATIO g_i = log_ratio ((b_i - a_i) / T - student) e^{a_i / T}."""

    student: Any = 0.0
    teacher: Any = 0.0
    excess: Any = 0.0
    student_t1: Any = 0.0
    constant: Any = 0.0
    affine: Any = 0.0
    log_ratio: Any = 0.0
    label: Any = 0.0


@triton.jit
def forward_kl(sums):
    """KL(p-hat || q-hat) over the classes of the sums: NCKD / T^2 with a label, KD / T^2 without."""
    return sums.dot * reciprocal(sums.sum_t) - log_ratio(sums.sum_t, sums.sum_s)


@triton.jit
def inverse_difference(sum_s, sum_t):
    """1 / sum_s - 1 / sum_t without cancellation."""
    return (sum_t - sum_s) * reciprocal(sum_s) * reciprocal(sum_t)


# A formula of the softmax family returns the loss, four terms and the gradient of a row.


@triton.jit
def softmax(row, numbers, NEEDS: tl.constexpr):
    """w_ce CE + T^2 (w_kd KD + w_t TCKD + w_n NCKD); with fix_acquired TCKD only where the teacher is more
    confident in the target class."""
    options = SoftmaxOptions(*numbers)
    temperature = options.temperature
    w_ce = options.ce_weight
    w_kd = options.kd_weight
    w_t = options.tckd_weight
    w_n = options.nckd_weight
    sums = row.sums
    ce = 0.0
    kd = 0.0
    tckd = 0.0
    nckd = 0.0
    student = 0.0
    teacher = 0.0
    excess = 0.0
    student_t1 = 0.0
    constant = 0.0
    affine = 0.0
    label = 0.0
    if DISTILLS & NEEDS:
        nckd = forward_kl(sums)
        # Without a label no class is excluded: KD is NCKD over all classes.
        p_rest = 1.0
        q_rest = 1.0
        q_minus_p = 0.0
        gate = 1.0
        if LABELLED & NEEDS:
            label_a = (row.label.student - sums.max_s) * row.slopes.student
            label_b = (row.label.teacher - sums.max_t) * row.slopes.teacher
            odds_s = label_a - tl.log(sums.sum_s)
            odds_t = label_b - tl.log(sums.sum_t)
            difference = (label_b - label_a) - log_ratio(sums.sum_t, sums.sum_s)
            # Far from equality, the difference of the rounded odds: consistent with the KL's other terms.
            difference = tl.where(tl.abs(difference) < 1.0, difference, odds_t - odds_s)
            q = from_log_odds(odds_s)
            p = from_log_odds(odds_t)
            q_rest = q.no
            p_rest = p.no
            tckd, q_minus_p = binary_divergence(p, q, difference)
            gate = tl.where(difference <= 0, tl.where(options.fix_acquired != 0, 0.0, 1.0), 1.0)
        kd = tckd + p_rest * nckd
        tckd = gate * tckd
        inverse_s = reciprocal(sums.sum_s)
        inverse_t = reciprocal(sums.sum_t)
        student = temperature * inverse_s * (w_kd * q_rest - w_t * gate * q_minus_p + w_n)
        teacher = temperature * inverse_t * (w_kd * p_rest + w_n)
        excess = (w_kd * q_rest + w_n) * inverse_difference(sums.sum_s, sums.sum_t)
        excess = temperature * (excess - q_minus_p * (w_kd * inverse_t + w_t * gate * inverse_s))
        label = temperature * (w_kd + w_t * gate) * q_minus_p
        if STANDARDIZED & NEEDS:
            # G = sum g_i x_i over the standardised logits x.
            inverse = row.slopes.student * temperature
            along = temperature * (
                student * sums.moment_s
                - teacher * sums.moment_t
                + label * row.label_above_mean * row.slopes.student
            )
            spread = (row.classes - 1) * row.deviation
            affine = tl.where(spread > 0, -along * inverse / tl.where(spread > 0, spread, 1.0), 0.0)
            student *= inverse
            teacher *= inverse
            excess *= inverse
            label = label * inverse + affine * row.label_above_mean
        square = temperature * temperature
        kd *= square
        tckd *= square
        nckd *= square
    if CROSS_ENTROPY & NEEDS:
        smoothing = options.label_smoothing
        odds = from_log_odds((row.label.student - sums.max_s) - tl.log(sums.t1_s))
        ce = odds.softplus_no - smoothing * (sums.above_label / row.classes)
        student_t1 = w_ce * odds.no * reciprocal(sums.t1_s)
        constant = -w_ce * smoothing / row.classes
        label += w_ce * (smoothing - odds.no) + constant
    loss = w_ce * ce + w_kd * kd + w_t * tckd + w_n * nckd
    gradient = Gradient(student, teacher, excess, student_t1, constant, affine, 0.0, label)
    return loss, (ce, kd, tckd, nckd), gradient


@triton.jit
def nkd(row, numbers, NEEDS: tl.constexpr):
    """-p_y log q_y at T = 1, minus gamma T^2 sum over i != y of p-hat_i log q-hat_i."""
    options = NKDOptions(*numbers)
    sums = row.sums
    odds_s = from_log_odds((row.label.student - sums.max_s) - tl.log(sums.t1_s))
    odds_t = from_log_odds((row.label.teacher - sums.max_t) - tl.log(sums.t1_t))
    inverse_t = reciprocal(sums.sum_t)
    scale = options.gamma * options.temperature
    nontarget = tl.log(sums.sum_s) + sums.dot * inverse_t
    loss = odds_t.yes * odds_s.softplus_no + scale * options.temperature * nontarget
    excess = scale * inverse_difference(sums.sum_s, sums.sum_t)
    label = -odds_t.yes * odds_s.no
    student_t1 = -label * reciprocal(sums.t1_s)
    student = scale * reciprocal(sums.sum_s)
    gradient = Gradient(student, scale * inverse_t, excess, student_t1, label=label)
    return loss, (0.0, 0.0, 0.0, 0.0), gradient


@triton.jit
def ttm(row, numbers, NEEDS: tl.constexpr):
    """KL(softmax(gamma z_t) || softmax(z_s)), weighted by sum_i softmax(z_t)_i^gamma."""
    options = TTMOptions(*numbers)
    sums = row.sums
    power_sum = tl.exp(tl.log(sums.sum_t) - options.gamma * tl.log(sums.t1_t))
    weight = tl.where(options.weighted != 0, power_sum, 1.0)
    excess = weight * inverse_difference(sums.sum_s, sums.sum_t)
    gradient = Gradient(weight * reciprocal(sums.sum_s), weight * reciprocal(sums.sum_t), excess)
    return weight * forward_kl(sums), (0.0, 0.0, 0.0, 0.0), gradient


@triton.jit
def reverse_kl(row, numbers, NEEDS: tl.constexpr):
    """KL(q || p); its gradient is q_i (d_i - KL) / T with d = log q - log p."""
    sums = row.sums
    inverse_s = reciprocal(sums.sum_s)
    mean = sums.dot * inverse_s
    loss = log_ratio(sums.sum_t, sums.sum_s) - mean
    gradient = Gradient(student=mean, log_ratio=-row.slopes.student * inverse_s)
    return loss, (0.0, 0.0, 0.0, 0.0), gradient


# ---- the mixture family --------------------------------------------------------------------------------
# A formula returns the class's contribution to the row loss, and q h with h the derivative of the loss in q:
# the gradient is q (h_i - mean of h under q) / T, so h may be given relative to an origin, in which nothing
# cancels. And whether h is relative to a second origin, and how far that is above the first.


class Probabilities(NamedTuple):
    """Values per class; ``difference`` is computed from d, which is accurate near equality."""

    q: Any
    p: Any
    difference: Any  # p - q
    d: Any  # log(p / q)


class OverMixture(NamedTuple):
    """Of probabilities q and p and their mixture m."""

    log_q: Any  # log(q / m)
    log_p: Any
    q: Any  # q / m


@triton.jit
def over_mixture(d, weight_p, weight_q):
    """``OverMixture`` of m = weight_p p + weight_q q, where weight_p + weight_q = 1.

    m is the larger of q and p times 1 + x, x = w (e^-|d| - 1), w the weight of the smaller one. Near x = -1,
    1 + x is computed as the sum of the weighted terms, without cancellation."""
    teacher_larger = d > 0
    weight_larger = tl.where(teacher_larger, weight_p, weight_q)
    weight_smaller = tl.where(teacher_larger, weight_q, weight_p)
    x = weight_smaller * expm1_of_negative(-tl.abs(d))
    smaller = tl.exp(-tl.abs(d))  # over the larger
    total = weight_larger + weight_smaller * smaller
    total = tl.where(total < 1e-37, 1e-37, total)
    log_larger = -log1p_of_negative(x, total)
    log_q = tl.where(teacher_larger, log_larger - d, log_larger)
    log_p = tl.where(teacher_larger, log_larger, log_larger + d)
    return OverMixture(log_q, log_p, tl.where(teacher_larger, smaller, 1.0) * reciprocal(total))


@triton.jit
def jsd(probs, numbers):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; h = (1 - beta) log(q / m)."""
    options = JSDOptions(*numbers)
    over = over_mixture(probs.d, options.beta, options.rest)
    weighted_slope = options.rest * (probs.q * over.log_q)
    return options.beta * (probs.p * over.log_p) + weighted_slope, weighted_slope, False, 0.0


@triton.jit
def tvd(probs, numbers):
    """1/2 |p - q|; h = 1/2 sign(q - p), relative to 1/2, and to -1/2 where p > q."""
    weighted_slope = tl.where(probs.d == 0, -0.5 * probs.q, 0.0)
    return 0.5 * tl.abs(probs.difference), weighted_slope, probs.d > 0, -1.0


@triton.jit
def skew_kl(probs, numbers):
    """KL(p || m), m = skew p + (1 - skew) q; h = -(1 - skew) p / m, relative to its value at p = q unless
    p < q / 2."""
    options = SkewOptions(*numbers)
    rest = options.rest
    over = over_mixture(probs.d, options.skew, rest)
    above = rest * probs.difference  # p - m
    far = 2.0 * probs.p < probs.q
    slope = -rest * (over.q * tl.where(far, probs.p, above))
    # Adding m - p, whose sum is 0, makes every class's value positive: no cancellation near equality.
    return probs.p * over.log_p - above, slope, far, rest


@triton.jit
def skew_reverse_kl(probs, numbers):
    """KL(q || m), m = (1 - skew) p + skew q; h = log(q / m) + skew (1 - q / m)."""
    options = SkewOptions(*numbers)
    rest = options.rest
    over = over_mixture(probs.d, rest, options.skew)
    q_log = probs.q * over.log_q
    weighted_slope = q_log + (options.skew * rest) * (over.q * probs.difference)
    return q_log + rest * probs.difference, weighted_slope, False, 0.0


# ---- the pointwise family ------------------------------------------------------------------------------
# A formula returns the value per class, to be multiplied by T^2, and its derivative in u.


@triton.jit
def binary_kl(student, teacher, inverse):
    """KL(Bern(sigmoid(v)) || Bern(sigmoid(u))) and its derivative in u."""
    u = student * inverse
    v = teacher * inverse
    e_u = tl.exp2(tl.abs(u) * -LOG2E)
    e_v = tl.exp2(tl.abs(v) * -LOG2E)
    one_u = 1.0 + e_u
    one_v = 1.0 + e_v
    both = one_u + one_v
    common = reciprocal(one_u * one_v * both)
    sigmoid_u = tl.where(u > 0, 1.0, e_u) * (one_v * both * common)
    sigmoid_v = tl.where(v > 0, 1.0, e_v) * (one_u * both * common)
    # softplus(u) - softplus(v) = max(u, 0) - max(v, 0) + log((1 + e_u) / (1 + e_v)).
    log_ratio = twice_atanh((e_u - e_v) * (one_u * one_v * common))
    hinges = tl.where(u > 0, u, 0.0) - tl.where(v > 0, v, 0.0)
    return sigmoid_v * (v - u) + (hinges + log_ratio), sigmoid_u - sigmoid_v


@triton.jit
def binary_kl_norm(student, teacher, inverse):
    """log cosh(x) at x = (u - v) / 2, and its derivative in u, tanh(x) / 2."""
    x = (student - teacher) * (0.5 * inverse)
    size = tl.abs(x)
    small = size < 0.2
    # Series for small |x|, where log cosh and e^{-2|x|} - 1 cancel.
    s = x * x
    value_series = s * tl.fma(s, tl.fma(s, tl.fma(s, -17.0 / 2520, 1.0 / 45), -1.0 / 12), 0.5)
    high = tl.fma(s, tl.fma(s, -1382.0 / 155925, 62.0 / 2835), -17.0 / 315)
    tanh_series = x * tl.fma(s, tl.fma(s, tl.fma(s, high, 2.0 / 15), -1.0 / 3), 1.0)
    e_minus_one = tl.exp2(size * (-2 * LOG2E)) - 1.0
    four = 4.0 + e_minus_one
    two = 2.0 + e_minus_one
    ratio = e_minus_one * reciprocal(four * two)
    value = size + twice_atanh(ratio * two)
    tanh = ratio * four
    tanh = tl.where(small, tanh_series, tl.where(x < 0, tanh, -tanh))
    return tl.where(small, value_series, value), 0.5 * tanh

"""Row formulas and scalar functions: statistics of a row -> loss, terms and the numbers of its gradient.

The same as ``csrc/row_math.h``; docs/formulas.md derives them.
"""

import triton
import triton.language as tl


@triton.jit
def log1p(x):
    # log(1 + x) alone loses x's low bits; dividing by what 1 + x kept of it restores them (Kahan).
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, e) / (1.0 + e)


@triton.jit
def softmax_family(
    statistics,
    options,
    student_scale,
    teacher_scale,
    label,
    classes,
    LABELLED: tl.constexpr,
    DISTILS: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    STANDARDIZED: tl.constexpr,
):
    """w_ce CE + T^2 (w_kd KD + w_t TCKD + w_n NCKD): loss, four terms, six numbers of the gradient.

    g_i = student e^{u_i - max u} - teacher e^{v_i - max v} + plain e^{z_i - max z} + constant
          + affine (z_i - mean), and g_y = target.
    """
    max_s, sum_s, moment_s, max_t, sum_t, moment_t, dot, sum_1, logit_sum = statistics
    temperature, w_ce, w_kd, w_t, w_n, smoothing = options
    slope_s, mean_s, deviation_s = student_scale
    slope_t, mean_t, deviation_t = teacher_scale
    label_s, label_t = label
    ce = 0.0
    kd = 0.0
    tckd = 0.0
    nckd = 0.0
    student = 0.0
    teacher = 0.0
    plain = 0.0
    constant = 0.0
    affine = 0.0
    target = 0.0
    if DISTILS:
        # Differences of logits come before the logarithms: large logits must not swallow them.
        log_s = tl.log(sum_s)
        log_t = tl.log(sum_t)
        if STANDARDIZED:
            max_v_minus_u = (max_t - mean_t) * slope_t - (max_s - mean_s) * slope_s
        else:
            max_v_minus_u = (max_t - max_s) * slope_s
        nckd = dot / sum_t - max_v_minus_u - (log_t - log_s)
        # Without a label nothing is left out, and KD is NCKD over all classes.
        q = 0.0
        p = 0.0
        q_rest = 1.0
        p_rest = 1.0
        label_u = 0.0
        if LABELLED:
            label_u = (label_s - mean_s) * slope_s
            odds_s = (label_s - max_s) * slope_s - log_s
            odds_t = (label_t - max_t) * slope_t - log_t
            q = sigmoid(odds_s)
            q_rest = sigmoid(-odds_s)
            p = sigmoid(odds_t)
            p_rest = sigmoid(-odds_t)
            tckd = p * (odds_t - odds_s) + (softplus(odds_s) - softplus(odds_t))
        kd = tckd + p_rest * nckd
        student = temperature / sum_s * (w_kd * q_rest + w_t * (p - q) + w_n)
        teacher = temperature / sum_t * (w_kd * p_rest + w_n)
        target = temperature * (w_kd + w_t) * (q - p)
        if STANDARDIZED:
            # G = sum g_i x_i over the standardised logits x = T u.
            inverse = slope_s * temperature
            along = temperature * (student * moment_s - teacher * moment_t + target * label_u)
            spread = (classes - 1) * deviation_s
            affine = tl.where(spread > 0, -along * inverse / tl.where(spread > 0, spread, 1.0), 0.0)
            student *= inverse
            teacher *= inverse
            target = target * inverse + affine * (label_s - mean_s)
        square = temperature * temperature
        kd *= square
        tckd *= square
        nckd *= square
    if CROSS_ENTROPY:
        odds = (label_s - max_s) - tl.log(sum_1)
        rest = sigmoid(-odds)
        ce = softplus(-odds) + smoothing * (label_s - logit_sum / classes)
        plain = w_ce * rest / sum_1
        constant = -w_ce * smoothing / classes
        target += w_ce * (smoothing - rest) + constant
    loss = w_ce * ce + w_kd * kd + w_t * tckd + w_n * nckd
    return loss, (ce, kd, tckd, nckd), (student, teacher, plain, constant, affine, target)


@triton.jit
def twice_atanh(w):
    """2 atanh(w) for |w| <= 1/3: a least-maximum-error fit, relative error 4e-9."""
    s = w * w
    return w * (2.0 + s * (0.666663094 + s * (0.400251554 + s * (0.279569799 + s * 0.281950615))))


@triton.jit
def binary_kl(student, teacher, inverse):
    """KL(Bern(sigmoid(v)) || Bern(sigmoid(u))) and its derivative in u."""
    u = student * inverse
    v = teacher * inverse
    e_u = tl.exp(-tl.abs(u))
    e_v = tl.exp(-tl.abs(v))
    sigmoid_u = tl.where(u > 0, 1.0, e_u) / (1.0 + e_u)
    sigmoid_v = tl.where(v > 0, 1.0, e_v) / (1.0 + e_v)
    # softplus(u) - softplus(v) = max(u, 0) - max(v, 0) + log((1 + e_u) / (1 + e_v)).
    log_ratio = twice_atanh((e_u - e_v) / (2.0 + e_u + e_v))
    hinges = tl.where(u > 0, u, 0.0) - tl.where(v > 0, v, 0.0)
    return sigmoid_v * (v - u) + (hinges + log_ratio), sigmoid_u - sigmoid_v


@triton.jit
def binary_kl_norm(student, teacher, inverse):
    """log cosh(x) and its derivative tanh(x) at x = (z_s - z_t) / 2T."""
    x = (student - teacher) * (0.5 * inverse)
    size = tl.abs(x)
    small = size < 0.2
    s = tl.where(small, x * x, 0.0)
    # The series where log cosh would cancel to rounding, and tanh lose what e^{-2|x|} - 1 loses.
    value_series = s * (0.5 - s * (1.0 / 12 - s * (1.0 / 45 - s * (17.0 / 2520))))
    tanh_series = x * (
        1.0 - s * (1.0 / 3 - s * (2.0 / 15 - s * (17.0 / 315 - s * (62.0 / 2835 - s * (1382.0 / 155925)))))
    )
    e_minus_one = tl.exp(-2.0 * size) - 1.0
    value = size + twice_atanh(e_minus_one / (4.0 + e_minus_one))
    tanh = -e_minus_one / (2.0 + e_minus_one)
    return tl.where(small, value_series, value), tl.where(small, tanh_series, tl.where(x < 0, -tanh, tanh))

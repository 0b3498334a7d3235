"""Row formulas and scalar functions: statistics of a row -> loss, terms and the numbers of its gradient.

Those of ``csrc/row_formulas.h``, in float32 throughout; docs/formulas.md derives them.
"""

import triton
import triton.language as tl

from fastkd.ops.triton.statistics import CROSS_ENTROPY, DISTILS, LABELLED, STANDARDIZED


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
def twice_atanh(w):
    """2 atanh(w) for |w| <= 1/3: a least-maximum-error fit, relative error 4e-9."""
    s = w * w
    return w * (2.0 + s * (0.666663094 + s * (0.400251554 + s * (0.279569799 + s * 0.281950615))))


@triton.jit
def expm1_of_negative(x):
    """e^x - 1 for x <= 0."""
    near = x > -0.35
    y = tl.where(near, x, 0.0)
    series = y * (
        1.0 + y * (1 / 2 + y * (1 / 6 + y * (1 / 24 + y * (1 / 120 + y * (1 / 720 + y * (1 / 5040))))))
    )
    return tl.where(near, series, tl.exp(x) - 1.0)


@triton.jit
def log1p_of_negative(x):
    """log(1 + x) for -1 < x <= 0."""
    near = x > -0.5
    y = tl.where(near, x, 0.0)
    return tl.where(near, twice_atanh(y / (2.0 + y)), tl.log(1.0 + x))


@triton.jit
def log_ratio(x, y):
    """log(x / y) of two sums: the difference of their logarithms loses what is common to both."""
    w = (x - y) / (x + y)
    near = tl.abs(w) < 1.0 / 3
    return tl.where(near, twice_atanh(tl.where(near, w, 0.0)), tl.log(x) - tl.log(y))


@triton.jit
def forward_kl(sums):
    """KL(p-hat || q-hat) over the classes of the sums: NCKD / T^2 with a label, KD / T^2 without."""
    max_s, sum_s, plain_s, max_t, sum_t, plain_t, dot, moment_s, moment_t, above_label = sums
    return dot / sum_t - log_ratio(sum_t, sum_s)


@triton.jit
def apart_inverses(sum_s, sum_t):
    """1 / sum_s - 1 / sum_t without the rounding of both."""
    return (sum_t - sum_s) / sum_s / sum_t


# A formula takes the statistics of a row and returns its loss, four terms and eight numbers of its gradient:
# g_i = (student + tilt (b_i - a_i)) e^{a_i} - teacher e^{b_i} + plain e^{z_i - max z} + constant
#       + affine (z_i - mean), and g_y = target; a and b as in statistics.py. ``excess`` is student - teacher,
# from their difference: near equality it is lost in the rounding of the two.


@triton.jit
def softmax(
    sums,
    numbers,
    slopes,
    deviation,
    label_above_mean,
    label,
    classes,
    NEEDS: tl.constexpr,
):
    """w_ce CE + T^2 (w_kd KD + w_t TCKD + w_n NCKD); with one_sided TCKD only where the teacher is more
    confident in the target class."""
    max_s, sum_s, plain_s, max_t, sum_t, plain_t, dot, moment_s, moment_t, above_label = sums
    temperature, w_ce, w_kd, w_t, w_n, smoothing, one_sided = numbers
    slope_s, slope_t = slopes
    label_s, label_t = label
    ce = 0.0
    kd = 0.0
    tckd = 0.0
    nckd = 0.0
    student = 0.0
    teacher = 0.0
    excess = 0.0
    plain = 0.0
    constant = 0.0
    affine = 0.0
    target = 0.0
    if DISTILS & NEEDS:
        nckd = forward_kl(sums)
        # Without a label nothing is left out, and KD is NCKD over all classes.
        p_rest = 1.0
        q_rest = 1.0
        q_minus_p = 0.0
        gate = 1.0
        if LABELLED & NEEDS:
            label_a = (label_s - max_s) * slope_s
            label_b = (label_t - max_t) * slope_t
            odds_s = label_a - tl.log(sum_s)
            odds_t = label_b - tl.log(sum_t)
            apart = (label_b - label_a) - log_ratio(sum_t, sum_s)
            # Far apart, that of the rounded odds: with another the KL of the two would have their rounding.
            near = tl.abs(apart) < 1.0
            apart = tl.where(near, apart, odds_t - odds_s)
            q = sigmoid(odds_s)
            p = sigmoid(odds_t)
            q_rest = sigmoid(-odds_s)
            p_rest = sigmoid(-odds_t)
            fraction = expm1_of_negative(-tl.abs(apart))
            q_minus_p = tl.where(apart <= 0, -q * p_rest, p * q_rest) * fraction
            # By the smaller of p_y and 1 - p_y, and of softplus(m) and softplus(-m): a confident teacher's
            # KL would be lost in the rounding of the larger.
            confident = odds_t > 0
            sign = tl.where(confident, -1.0, 1.0)
            x = sign * odds_s
            y = sign * odds_t
            ratio = log1p_of_negative(tl.where(near, sigmoid(tl.maximum(x, y)) * fraction, 0.0))
            above = tl.where(near, tl.where(x < y, ratio, -ratio), softplus(x) - softplus(y))
            tckd = tl.where(confident, -p_rest, p) * apart + above
            gate = tl.where((one_sided != 0) & (apart <= 0), 0.0, 1.0)
        kd = tckd + p_rest * nckd
        tckd = gate * tckd
        student = temperature / sum_s * (w_kd * q_rest - w_t * gate * q_minus_p + w_n)
        teacher = temperature / sum_t * (w_kd * p_rest + w_n)
        excess = (w_kd * q_rest + w_n) * apart_inverses(sum_s, sum_t)
        excess = temperature * (excess - q_minus_p * (w_kd / sum_t + w_t * gate / sum_s))
        target = temperature * (w_kd + w_t * gate) * q_minus_p
        if STANDARDIZED & NEEDS:
            # G = sum g_i x_i over the standardised logits x.
            inverse = slope_s * temperature
            along = temperature * (
                student * moment_s - teacher * moment_t + target * label_above_mean * slope_s
            )
            spread = (classes - 1) * deviation
            affine = tl.where(spread > 0, -along * inverse / tl.where(spread > 0, spread, 1.0), 0.0)
            student *= inverse
            teacher *= inverse
            excess *= inverse
            target = target * inverse + affine * label_above_mean
        square = temperature * temperature
        kd *= square
        tckd *= square
        nckd *= square
    if CROSS_ENTROPY & NEEDS:
        odds = (label_s - max_s) - tl.log(plain_s)
        rest = sigmoid(-odds)
        ce = softplus(-odds) - smoothing * (above_label / classes)
        plain = w_ce * rest / plain_s
        constant = -w_ce * smoothing / classes
        target += w_ce * (smoothing - rest) + constant
    loss = w_ce * ce + w_kd * kd + w_t * tckd + w_n * nckd
    return loss, (ce, kd, tckd, nckd), (student, teacher, excess, plain, constant, affine, 0.0, target)


@triton.jit
def nkd(
    sums,
    numbers,
    slopes,
    deviation,
    label_above_mean,
    label,
    classes,
    NEEDS: tl.constexpr,
):
    """-p_y log q_y at T = 1, minus gamma T^2 sum over i != y of p-hat_i log q-hat_i."""
    max_s, sum_s, plain_s, max_t, sum_t, plain_t, dot, moment_s, moment_t, above_label = sums
    temperature, gamma, o2, o3, o4, o5, o6 = numbers
    label_s, label_t = label
    odds_s = (label_s - max_s) - tl.log(plain_s)
    odds_t = (label_t - max_t) - tl.log(plain_t)
    p = sigmoid(odds_t)
    rest = sigmoid(-odds_s)
    nontarget = tl.log(sum_s) + dot / sum_t
    loss = p * softplus(-odds_s) + gamma * temperature * temperature * nontarget
    scale = gamma * temperature
    excess = scale * apart_inverses(sum_s, sum_t)
    plain = p * rest / plain_s
    coefficients = (scale / sum_s, scale / sum_t, excess, plain, 0.0, 0.0, 0.0, -p * rest)
    return loss, (0.0, 0.0, 0.0, 0.0), coefficients


@triton.jit
def ttm(
    sums,
    numbers,
    slopes,
    deviation,
    label_above_mean,
    label,
    classes,
    NEEDS: tl.constexpr,
):
    """KL(softmax(gamma z_t) || softmax(z_s)), weighted by sum_i softmax(z_t)_i^gamma."""
    max_s, sum_s, plain_s, max_t, sum_t, plain_t, dot, moment_s, moment_t, above_label = sums
    gamma, weighted, o2, o3, o4, o5, o6 = numbers
    weight = tl.where(weighted != 0, tl.exp(tl.log(sum_t) - gamma * tl.log(plain_t)), 1.0)
    loss = weight * forward_kl(sums)
    excess = weight * apart_inverses(sum_s, sum_t)
    coefficients = (weight / sum_s, weight / sum_t, excess, 0.0, 0.0, 0.0, 0.0, 0.0)
    return loss, (0.0, 0.0, 0.0, 0.0), coefficients


@triton.jit
def reverse_kl(
    sums,
    numbers,
    slopes,
    deviation,
    label_above_mean,
    label,
    classes,
    NEEDS: tl.constexpr,
):
    """KL(q || p); its gradient is q_i (d_i - KL) / T with d = log q - log p."""
    max_s, sum_s, plain_s, max_t, sum_t, plain_t, dot, moment_s, moment_t, above_label = sums
    slope_s, slope_t = slopes
    loss = log_ratio(sum_t, sum_s) - dot / sum_s
    scale = slope_s / sum_s
    coefficients = (scale * (dot / sum_s), 0.0, 0.0, 0.0, 0.0, 0.0, -scale, 0.0)
    return loss, (0.0, 0.0, 0.0, 0.0), coefficients


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
    """log cosh(x) at x = (u - v) / 2, and its derivative in u, tanh(x) / 2."""
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
    tanh = tl.where(small, tanh_series, tl.where(x < 0, -tanh, tanh))
    return tl.where(small, value_series, value), 0.5 * tanh

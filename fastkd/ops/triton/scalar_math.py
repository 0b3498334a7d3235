"""Scalar functions of the formulas: logarithms, exponentials and probabilities without cancellation for close
arguments, with few instructions (every thread of a row computes what its formula needs)."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from fastkd.ops.triton.tiles import COMPILED

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def reciprocal(x):
    """1 / x with an error of 1 unit in the last place, and 0 if it is below 1.2e-38: on NVIDIA GPUs one
    instruction, where a division is five."""
    if COMPILED and is_cuda():
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def twice_atanh(w):
    """2 atanh(w) for |w| <= 1/3: a minimax fit, relative error 4e-9."""
    s = w * w
    series = tl.fma(s, tl.fma(s, tl.fma(s, 0.281950615, 0.279569799), 0.400251554), 0.666663094)
    return w * tl.fma(s, series, 2.0)


@triton.jit
def log1p_near_zero(x):
    """log(1 + x) for -1/2 <= x <= 1."""
    return twice_atanh(x * reciprocal(2.0 + x))


@triton.jit
def expm1_of_negative(x):
    """e^x - 1 for x <= 0."""
    near = x > -0.35
    y = tl.where(near, x, 0.0)
    series = tl.fma(y, tl.fma(y, tl.fma(y, 1 / 5040, 1 / 720), 1 / 120), 1 / 24)
    series = tl.fma(y, tl.fma(y, tl.fma(y, series, 1 / 6), 1 / 2), 1.0)
    return tl.where(near, y * series, tl.exp(x) - 1.0)


@triton.jit
def log_below_half(x):
    """log(x) for 1.2e-38 <= x <= 1/2: on NVIDIA GPUs one instruction and a product, with a relative error of
    3e-7, where tl.log is twenty."""
    if COMPILED and is_cuda():
        log2 = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        return log2 * LN2
    else:
        return tl.log(x)


@triton.jit
def log1p_of_negative(x, one_plus_x):
    """log(1 + x) for -1 <= x <= 0; ``one_plus_x`` may be more accurate than the sum, near x = -1."""
    near = x > -0.5
    return tl.where(near, log1p_near_zero(tl.where(near, x, 0.0)), log_below_half(one_plus_x))


@triton.jit
def log_ratio(x, y):
    """log(x / y) of two sums, without cancellation for close x and y."""
    w = (x - y) * reciprocal(x + y)
    near = tl.abs(w) < 1.0 / 3
    return tl.where(near, twice_atanh(tl.where(near, w, 0.0)), tl.log(x) - tl.log(y))


class Odds(NamedTuple):
    """Of log odds x, from one exponential."""

    yes: Any  # sigmoid(x)
    no: Any  # sigmoid(-x)
    softplus: Any  # log(1 + e^x)
    softplus_no: Any  # log(1 + e^-x)


@triton.jit
def from_log_odds(x):
    e = tl.exp(-tl.abs(x))
    larger = reciprocal(1.0 + e)
    smaller = e * larger
    rest = log1p_near_zero(e)
    above = tl.abs(x) + rest
    likely = x > 0
    return Odds(
        tl.where(likely, larger, smaller), tl.where(likely, smaller, larger),
        tl.where(likely, above, rest), tl.where(likely, rest, above),
    )  # fmt: skip


@triton.jit
def binary_divergence(p, q, difference):
    """KL((p, 1 - p) || (q, 1 - q)) of ``Odds``, and q - p; ``difference`` is log odds p - log odds q."""
    near = tl.abs(difference) < 1.0
    fraction = expm1_of_negative(-tl.abs(difference))
    q_minus_p = tl.where(difference <= 0, -q.yes * p.no, p.yes * q.no) * fraction
    # In terms of the outcome that p gives the smaller probability, and of its softplus: otherwise the KL of a
    # confident teacher is lost to rounding.
    swaps = p.yes > p.no
    least_p = tl.where(swaps, p.no, p.yes)
    least_q = tl.where(swaps, q.no, q.yes)
    softplus_p = tl.where(swaps, p.softplus_no, p.softplus)
    softplus_q = tl.where(swaps, q.softplus_no, q.softplus)
    # The difference of the softpluses cancels where the two are close. There the larger of the two
    # probabilities is at most e / (1 + e), so the step is above -1/2.
    step = tl.where(near, tl.where(least_q < least_p, least_p, least_q) * fraction, 0.0)
    ratio = log1p_near_zero(step)
    above = tl.where(near, tl.where(least_q < least_p, ratio, -ratio), softplus_q - softplus_p)
    return tl.where(swaps, -least_p, least_p) * difference + above, q_minus_p

// A vector of floats in the instruction set that the including file targets, and its functions. Compiled once per
// instruction set in its own namespace (FASTKD_ISA), so that code for a newer set cannot be linked into an older one's;
// for the same reason no std template is used.
#pragma once

#include <cstdint>
#include <cstring>

#include "../row_math.h"

#define FASTKD_INLINE static inline __attribute__((always_inline))

namespace fastkd {
namespace FASTKD_ISA {

constexpr int kLanes = FASTKD_VECTOR_BYTES / 4;

typedef float vf __attribute__((vector_size(FASTKD_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(FASTKD_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(FASTKD_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(FASTKD_VECTOR_BYTES / 2)));

FASTKD_INLINE vf broadcast(float x) { return x - vf{}; }
FASTKD_INLINE vf as_float(vi x) { return (vf)x; }
FASTKD_INLINE vi as_int(vf x) { return (vi)x; }
FASTKD_INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
FASTKD_INLINE vf absolute(vf x) { return as_float(as_int(x) & 0x7fffffff); }

FASTKD_INLINE vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
FASTKD_INLINE void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }

// Maximum. Propagates a NaN in `x`; `bound` must not be NaN.
FASTKD_INLINE vf at_least(vf x, vf bound) {
#if defined(FASTKD_USE_AVX512)
  return (vf)_mm512_max_ps((__m512)bound, (__m512)x);
#elif defined(FASTKD_USE_AVX2)
  return (vf)_mm256_max_ps((__m256)bound, (__m256)x);
#else
  return x < bound ? bound : x;
#endif
}

// As the scalar function of row_math.h.
FASTKD_INLINE vf rounded(vf x) {
#if defined(FASTKD_USE_AVX512)
  asm("" : "+v"(x));  // all 32 registers
#else
  asm("" : FASTKD_FLOAT_REGISTER(x));
#endif
  return x;
}

FASTKD_INLINE float horizontal_sum(vf x) {
  float sum = 0;
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) x[i] += x[i + width];
  sum = x[0];
  return sum;
}

FASTKD_INLINE float horizontal_max(vf x) {
  float largest = x[0];
  for (int i = 1; i < kLanes; i++) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits.
constexpr float kRoundingConstant = 12582912.0f;

// 2^y = scale + scale * minus_one for -127 <= y < 127; two fields, so that 2^y - 1 can be formed without cancellation.
struct PowerOfTwo {
  vf scale, minus_one;
};

FASTKD_INLINE PowerOfTwo power_of_two(vf y) {
  constexpr float kBias = kRoundingConstant + 127.0f;  // the exponent of 1
  const vf shifted = rounded(y + kBias);
  const vf scale = as_float((vi)((vu)shifted << 23)), f = y - (shifted - kBias);
  // Minimax fit of (2^f - 1) / f, relative error 1e-8.
  const vf slope =
      0.693147188f +
      f * (0.240226498f + f * (0.0555035722f + f * (0.00961823793f + f * (0.00133908498f + f * 0.000154035126f))));
  return {scale, f * slope};
}

// step_power: 2^(n / kSteps) from the low bits of n, exactly 0 at -127 * kSteps. rest_slope: (2^(f / kSteps) - 1) / f
// for |f| <= 1/2, a minimax fit; the table of kSteps powers saves it two terms.
#if defined(FASTKD_USE_AVX2) || defined(FASTKD_USE_AVX512)
constexpr int kSteps = 8;

FASTKD_INLINE vf step_power(vi n) {
  // The bits of 2^(j / 8), minus the contribution of j to n << 20 below.
#define FASTKD_STEPS 0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7
#if defined(FASTKD_USE_AVX512)
  const vi table = {FASTKD_STEPS, FASTKD_STEPS};
  const vi step = (vi)_mm512_permutexvar_epi32((__m512i)n, (__m512i)table);
#else
  const vi table = {FASTKD_STEPS};
  const vi step = (vi)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)n);
#endif
#undef FASTKD_STEPS
  return as_float((vi)((vu)step + ((vu)n << 20)));  // unsigned: n is arbitrary if the logit is NaN
}

FASTKD_INLINE vf rest_slope(vf f) {  // error 2.7e-8
  return 0.0866434053f + f * (0.00375402556f + f * 0.000108391061f);
}
#else
constexpr int kSteps = 1;

FASTKD_INLINE vf step_power(vi n) { return as_float((vi)(((vu)n << 23) + 0x3f800000u)); }  // unsigned, as above

FASTKD_INLINE vf rest_slope(vf f) {  // error 1.1e-7
  return 0.693147004f + f * (0.240222424f + f * (0.0555073395f + f * (0.00967151113f + f * 0.00132646528f)));
}
#endif

constexpr double kLog2E = 1.4426950408889634;

// e^(slope x) = 2^(factor x / kSteps); 0 for x <= `lowest`.
struct Exponent {
  vf factor, lowest;
};

FASTKD_INLINE Exponent exponent_of(double slope) {
  const float factor = float(slope * kLog2E * kSteps);
  return {broadcast(factor), broadcast(-127.0f * kSteps / factor)};
}

// For slope * x < 88; exactly 0 below 2^-126, propagates NaN.
FASTKD_INLINE vf exp_or_zero(vf x, const Exponent& exponent) {
  x = at_least(x, exponent.lowest);
  const vf shifted = rounded(x * exponent.factor + kRoundingConstant);
  const vf scale = step_power(as_int(shifted)), rest = x * exponent.factor - (shifted - kRoundingConstant);
  return scale + (scale * rest) * rest_slope(rest);
}

FASTKD_INLINE vf exp_or_zero(vf x) { return exp_or_zero(x, exponent_of(1.0)); }

// 2 atanh(w) = log((1 + w) / (1 - w)) for |w| <= 1/3, relative error 4e-9.
FASTKD_INLINE vf twice_atanh(vf w) {
  const vf s = w * w;
  return w * (2.0f + s * (0.666663094f + s * (0.400251554f + s * (0.279569799f + s * 0.281950615f))));
}

// x = 2^exponent * fraction with fraction in [sqrt(1/2), sqrt(2)), for normal x > 0.
struct FloatParts {
  vf exponent, fraction;
};

FASTKD_INLINE FloatParts split_float(vf x) {
  const vu bits = (vu)x, above = bits - 0x3f3504f3u;
  return {__builtin_convertvector((vi)above >> 23, vf), (vf)(bits - (above & 0xff800000u))};
}

// The significand of x >= 0, in [1, 2).
FASTKD_INLINE vf significand(vf x) { return as_float((as_int(x) & 0x007fffff) | 0x3f800000); }

// log(x) for normal x > 0.
FASTKD_INLINE vf natural_log(vf x) {
  const FloatParts parts = split_float(x);  // (y - 1) / (y + 1) is at most 0.172
  const vf y = parts.fraction;
  return twice_atanh((y - 1.0f) / (y + 1.0f)) + parts.exponent * 0.693147181f;
}

// x log(x / m) for probabilities x and m, m at least a fixed share of x; 0 at x = 0. `above` is x - m: for close x and
// m the logarithm is computed from it, because the rounded m loses their difference. Otherwise from their significands
// in [1, 2), whose ratio is in (1/2, 2). Either way one division, which takes as long as six multiplications.
FASTKD_INLINE vf times_log_ratio(vf x, vf m, vf above) {
  const vf x_part = significand(x), m_part = significand(m);
  const vi close = absolute(above) < 0.25f * m;
  const vf numerator = select(close, above, x_part - m_part), denominator = select(close, x + m, x_part + m_part);
  const vf steps = __builtin_convertvector((as_int(x) >> 23) - (as_int(m) >> 23), vf);
  return x * (twice_atanh(numerator / denominator) + select(close, vf{}, steps * 0.693147181f));
}

// The functions used by the formulas of csrc/row_formulas.h.
struct VectorMath {
  FASTKD_INLINE vf number(float x) { return broadcast(x); }
  FASTKD_INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
  FASTKD_INLINE vf absolute(vf x) { return FASTKD_ISA::absolute(x); }
  FASTKD_INLINE vf fused(vf a, vf b, vf c) { return a * b + c; }
  FASTKD_INLINE vf bounded_quotient(vf a, vf b) { return a / b; }  // faster on a GPU, for b from 2^-126 to 2^126
  FASTKD_INLINE vf share(vf part, vf m) { return part / select(m > 0.0f, m, broadcast(1.0f)); }  // 0 if m is 0
  FASTKD_INLINE vf with_sign_of(vf magnitude, vf x) {  // of magnitude >= 0
    return as_float(as_int(magnitude) | (as_int(x) & int32_t(0x80000000)));
  }
  FASTKD_INLINE vf exp(vf x) { return exp_or_zero(x); }  // of x < 88
  FASTKD_INLINE vf exp2_minus_one(vf y) {                // of y <= 0
    const PowerOfTwo e = power_of_two(at_least(y, broadcast(-126.0f)));
    return e.scale * e.minus_one + (e.scale - 1.0f);
  }
  FASTKD_INLINE vf twice_atanh(vf w) { return FASTKD_ISA::twice_atanh(w); }
  FASTKD_INLINE vf times_log_ratio(vf x, vf m, vf above) { return FASTKD_ISA::times_log_ratio(x, m, above); }
};

}  // namespace FASTKD_ISA
}  // namespace fastkd

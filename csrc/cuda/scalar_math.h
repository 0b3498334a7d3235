// Logarithms and exponentials without cancellation for close arguments.
#pragma once

#include "../row_math.h"
#include "device.h"

namespace fastkd {
namespace cuda {

constexpr float kLog2E = 1.44269504f;
// Added to a number below 2^22 it rounds it to an integer, which is then in the lowest bits.
constexpr float kRounder = 12582912.0f;

// 2^y - 1 for y <= 0, without cancellation near 0.
FASTKD_DEVICE float exp2_minus_one(float y) {
  const float bounded = larger_or_nan(y, -126.0f), shifted = bounded + kRounder, f = bounded - (shifted - kRounder);
  // Minimax fit of (2^f - 1) / f, relative error 1e-8.
  float slope = fused(f, 0.000154035126f, 0.00133908498f);
  slope = fused(f, slope, 0.00961823793f);
  slope = fused(f, slope, 0.0555035722f);
  slope = fused(f, slope, 0.240226498f);
  slope = fused(f, slope, 0.693147188f);
  const float scale = as_float((as_bits(shifted) << 23) + 0x3f800000u);
  return fused(scale, f * slope, scale - 1.0f);
}

// 1 / m of a probability, within 2 ulp for m above 2^-100; finite for 0.
FASTKD_DEVICE float bounded_inverse(float m) { return reciprocal(m + 0x1p-126f); }

// x log(x / m) of probabilities; 0 at x = 0, NaN for a NaN of x. `above` is x - m: for close x and m the logarithm is
// computed from it, because the rounded ratio x / m loses their difference. There is no branch: the threads of a warp
// would take both ways.
FASTKD_DEVICE float times_log_ratio(float x, float m, float above) {
  const float inverse = bounded_inverse(m), w = above * bounded_inverse(x + m);
  const float far = log_of_two(fused(x, inverse, 0x1p-126f)) * 0.693147181f;
  return x * (fabsf(w) < 1.0f / 3 ? twice_atanh(w) : far);
}

// The functions used by the formulas of csrc/row_formulas.h.
struct ScalarMath {
  static FASTKD_DEVICE float number(float x) { return x; }
  static FASTKD_DEVICE float select(bool mask, float yes, float no) { return mask ? yes : no; }
  static FASTKD_DEVICE float absolute(float x) { return fabsf(x); }
  static FASTKD_DEVICE float fused(float a, float b, float c) { return cuda::fused(a, b, c); }
  static FASTKD_DEVICE float bounded_quotient(float a, float b) { return a * reciprocal(b); }
  static FASTKD_DEVICE float share(float part, float m) { return part * bounded_inverse(m); }  // 0 if both are 0
  static FASTKD_DEVICE float with_sign_of(float magnitude, float x) {  // of magnitude >= 0
    return as_float(as_bits(magnitude) | (as_bits(x) & 0x80000000u));
  }
  static FASTKD_DEVICE float exp(float x) { return power_of_two(x * kLog2E); }
  static FASTKD_DEVICE float exp2_minus_one(float y) { return cuda::exp2_minus_one(y); }
  static FASTKD_DEVICE float twice_atanh(float w) { return fastkd::twice_atanh(w); }
  static FASTKD_DEVICE float times_log_ratio(float x, float m, float above) {
    return cuda::times_log_ratio(x, m, above);
  }
};

}  // namespace cuda
}  // namespace fastkd

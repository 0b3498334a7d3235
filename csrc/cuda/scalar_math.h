// Logarithms and exponentials that stay exact where two numbers are close.
#pragma once

#include "device.h"

namespace fastkd {
namespace cuda {

// 2 atanh(w) = log((1 + w) / (1 - w)) for |w| <= 1/3, relative error 4e-9.
FASTKD_DEVICE float twice_atanh(float w) {
  const float s = w * w;
  const float tail = fused(s, fused(s, fused(s, 0.281950615f, 0.279569799f), 0.400251554f), 0.666663094f);
  return w * fused(s, tail, 2.0f);
}

// e^x - 1 for x <= 0, without cancellation near 0.
FASTKD_DEVICE float exp_minus_one(float x) {
  const float y = x * 1.44269504f, n = rintf(y < -126.0f ? -126.0f : y), f = (y < -126.0f ? -126.0f : y) - n;
  // Least-maximum-error fit of (2^f - 1) / f, relative error 1e-8.
  float slope = fused(f, 0.000154035126f, 0.00133908498f);
  slope = fused(f, slope, 0.00961823793f);
  slope = fused(f, slope, 0.0555035722f);
  slope = fused(f, slope, 0.240226498f);
  slope = fused(f, slope, 0.693147188f);
  const float scale = as_float(uint32_t(int(n) + 127) << 23);
  return fused(scale, f * slope, scale - 1.0f);
}

}  // namespace cuda
}  // namespace fastkd

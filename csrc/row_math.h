// Statistics of a row, which can be combined in any order, and scalar functions, for CPU and CUDA kernels.
// row_formulas.h turns the statistics into losses.
//
// Notation: z logits, y the label, T the temperature, u = z_s / T, v = z_t / T (z standardised if requested), q =
// softmax(u), p = softmax(v). The label is excluded from every sum, which avoids cancellation. A NaN logit reaches a
// sum of its model, and through it the loss and every coefficient of the gradient.
#pragma once

#include <cmath>
#include <cstdint>

#include "glibc.h"

#ifdef __CUDACC__
#define FASTKD_ROW_FUNCTION __host__ __device__ inline
#else
// Internal linkage, and no member functions: code compiled for a newer instruction set must not be linked into other
// source files.
#define FASTKD_ROW_FUNCTION static inline
#endif

namespace fastkd {

// Below this a logit is a masked class; see MASKED in fastkd/reference.py.
constexpr float kMasked = -0x1p100f;
constexpr float kStandardizeEpsilon = 1e-7f;

// The value of what is in no sum, past the end of a row or the label, if that of masked classes is `masked`: it counts
// 0 even where all that count are masked.
FASTKD_ROW_FUNCTION float excluded_below(float masked) { return 2 * masked; }

// What a call needs of the row kernels; each need costs work per class. fastkd/ops/spec.py documents and computes them,
// and is compared with this list when the library is loaded.
#define FASTKD_NEEDS(need) \
  need(Distills) need(CrossEntropy) need(StudentAtT1) need(TeacherAtT1) need(CrossTerm) need(LogRatio) need(OwnSlopes) \
      need(Standardized) need(LabelSmoothing) need(SumsOnly) need(Labelled)

enum NeedBit : unsigned {
#define FASTKD_NEED_BIT(name) kBitOf##name,
  FASTKD_NEEDS(FASTKD_NEED_BIT)
#undef FASTKD_NEED_BIT
};

enum Needs : unsigned {
#define FASTKD_NEED(name) k##name = 1u << kBitOf##name,
  FASTKD_NEEDS(FASTKD_NEED)
#undef FASTKD_NEED
  // Template parameters of the row skeletons; the other needs are tested at run time.
  kCompiledNeeds = kStudentAtT1 |
  kTeacherAtT1 | kCrossTerm | kLogRatio | kOwnSlopes | kStandardized | kSumsOnly
};

// An operand of inline assembly that holds floating-point numbers.
#if defined(__x86_64__)
#define FASTKD_FLOAT_REGISTER "+x"
#elif defined(__aarch64__)
#define FASTKD_FLOAT_REGISTER "+w"
#else
#define FASTKD_FLOAT_REGISTER "+m"
#endif

// Keeps the compiler from fusing a product into a multiply-add, which would leave a rounding error where two equal
// products must cancel to 0. GPU code is compiled without fusion.
FASTKD_ROW_FUNCTION float rounded(float x) { return x; }
FASTKD_ROW_FUNCTION double rounded(double x) {
#ifndef __CUDACC__
  asm("" : FASTKD_FLOAT_REGISTER(x));
#endif
  return x;
}

// How one model's logits enter the softmax: u = z * slope, up to a constant, which the softmax cancels. For
// standardised logits also their mean (as the sum of a float and a small correction) and deviation, which the gradient
// needs.
template <class Real>
struct RowScale {
  Real slope, mean, mean_rest, deviation;
};

// Sums over a part of a row. Logits are relative to a base of their model, the largest logit seen or one not far below:
// x_s = z_s - max_s. Differences between the models are formed from these, so that an offset common to all logits of a
// model cancels before any rounding at its magnitude.
template <class Real>
struct SoftmaxStatistics {
  float max_s, max_t;       // the bases
  Real sum_s, sum_t;        // sum exp(u - max u), sum exp(v - max v)
  Real dot_s, dot_t;        // the same with each term times x_t - x_s; with kOwnSlopes, each x times its slope
  Real cross_t;             // sum exp(v - max v) x_s
  Real moment_s, moment_t;  // sum exp(u - max u) (z_s - mean), sum exp(v - max v) (z_s - mean)
  Real t1_s, t1_t;          // sum exp(z - max z), at T = 1
  Real logit_sum;           // sum z_s relative to Row::origin, the label included: label smoothing
};

struct RowLabel {
  bool present;
  float z_s, z_t;
};

// Sums are rebased only when a logit exceeds their base by this much: e^8 times a million classes is far from overflow,
// and as precise. `at_t1`: exponentials at T = 1 are needed too.
template <class Real>
FASTKD_ROW_FUNCTION Real headroom(bool at_t1, Real slope) {
  return 8 / (at_t1 && slope < 1 ? Real(1) : slope);
}

// Rebases sums to larger bases. Sums that kNeeds does not include may be left unchanged.
template <unsigned kNeeds = ~0u, class Real>
FASTKD_ROW_FUNCTION void rebase(SoftmaxStatistics<Real>& row, float max_s, float max_t, Real slope_s, Real slope_t) {
  const Real below_s = Real(row.max_s) - Real(max_s), below_t = Real(row.max_t) - Real(max_t);
  const Real step = kNeeds & kOwnSlopes ? below_t * slope_t - below_s * slope_s : below_t - below_s;
  row.max_s = max_s;
  row.max_t = max_t;
  // The step may have overflowed where the factor is 0: 0 * inf would be NaN.
  if (row.sum_s != 0 && (below_s != 0 || below_t != 0)) {
    const Real factor = std::exp(below_s * slope_s);
    if (kNeeds & kLogRatio) row.dot_s = factor != 0 ? factor * (row.dot_s + step * row.sum_s) : 0;
    if (kNeeds & kStandardized) row.moment_s *= factor;
    if (kNeeds & kStudentAtT1) row.t1_s *= std::exp(below_s);
    row.sum_s *= factor;
  }
  if (row.sum_t != 0 && (below_s != 0 || below_t != 0)) {
    const Real factor = std::exp(below_t * slope_t);
    row.dot_t = factor != 0 ? factor * (row.dot_t + step * row.sum_t) : 0;
    if (kNeeds & kCrossTerm) row.cross_t = factor != 0 ? factor * (row.cross_t + below_s * row.sum_t) : 0;
    if (kNeeds & kStandardized) row.moment_t *= factor;
    if (kNeeds & kTeacherAtT1) row.t1_t *= std::exp(below_t);
    row.sum_t *= factor;
  }
}

// Adds the sums of a part with the same bases.
template <class Real>
FASTKD_ROW_FUNCTION void add_sums(SoftmaxStatistics<Real>& row, const SoftmaxStatistics<Real>& part) {
  row.sum_s += part.sum_s, row.sum_t += part.sum_t;
  row.dot_s += part.dot_s, row.dot_t += part.dot_t;
  row.moment_s += part.moment_s, row.moment_t += part.moment_t;
  row.cross_t += part.cross_t;
  row.t1_s += part.t1_s, row.t1_t += part.t1_t;
  row.logit_sum += part.logit_sum;
}

// 2 atanh(w) = log((1 + w) / (1 - w)) for |w| <= 1/3, relative error 4e-9.
FASTKD_ROW_FUNCTION float twice_atanh(float w) {
  const float s = w * w;
  const float tail = std::fma(s, std::fma(s, std::fma(s, 0.281950615f, 0.279569799f), 0.400251554f), 0.666663094f);
  return w * std::fma(s, tail, 2.0f);
}

// log(1 + x) for -1/2 <= x <= 1; the float version has a third of log1pf's instructions.
FASTKD_ROW_FUNCTION double log1p_near_zero(double x) { return std::log1p(x); }
FASTKD_ROW_FUNCTION float log1p_near_zero(float x) { return twice_atanh(x / (2 + x)); }

// sigmoid(x), sigmoid(-x), softplus(x) = -log sigmoid(-x) and softplus(-x) of log odds x, from one exponential.
template <class Real>
struct Odds {
  Real yes, no, softplus, softplus_no;
};

template <class Real>
FASTKD_ROW_FUNCTION Odds<Real> from_log_odds(Real x) {
  const Real e = std::exp(x > 0 ? -x : x), larger = 1 / (1 + e), smaller = e * larger, rest = log1p_near_zero(e);
  return x > 0 ? Odds<Real>{larger, smaller, x + rest, rest} : Odds<Real>{smaller, larger, rest, rest - x};
}

// log(a / b). The float version is accurate also for a close to b; doubles here come from sums that hold fewer digits.
FASTKD_ROW_FUNCTION double log_ratio(double a, double b) { return std::log(a / b); }
FASTKD_ROW_FUNCTION float log_ratio(float a, float b) {
  const float difference = a - b;
  return std::fabs(difference) < b / 2 ? log1p_near_zero(difference / b) : std::log(a / b);
}

// KL((p, 1 - p) || (q, 1 - q)); `difference` is log odds p - log odds q.
template <class Real>
FASTKD_ROW_FUNCTION Real binary_divergence(const Odds<Real>& p, const Odds<Real>& q, Real difference) {
  // Of the two outcomes the one that p gives the smaller probability, and whose terms are the smaller: the log odds of
  // a certain one are too large to be added to anything.
  const bool swaps = p.yes > p.no;
  const Real smaller = swaps ? p.no : p.yes, above = swaps ? -difference : difference;
  const Real softplus_q = swaps ? q.softplus_no : q.softplus, softplus_p = swaps ? p.softplus_no : p.softplus;
  // In float the difference of the softpluses cancels where the two are close.
  const bool cancels = sizeof(Real) == sizeof(float) && std::fabs(above) < 1;
  const Real rest = cancels ? log1p_near_zero(smaller * std::expm1(-above)) : softplus_q - softplus_p;
  return smaller * above + rest;
}

// q - p of odds; `difference` is log odds p - log odds q. The float version does not cancel.
FASTKD_ROW_FUNCTION double difference_of(const Odds<double>& q, const Odds<double>& p, double) { return q.yes - p.yes; }
FASTKD_ROW_FUNCTION float difference_of(const Odds<float>& q, const Odds<float>& p, float difference) {
  const float fraction = std::expm1(-std::fabs(difference));
  return difference > 0 ? p.yes * q.no * fraction : -q.yes * p.no * fraction;
}

}  // namespace fastkd

// Statistics of a row, which combine in any order, and scalar functions. Plain code, shared by the CPU and CUDA
// kernels; row_formulas.h turns the statistics into losses.
//
// Notation: z logits, y the label, T the temperature, u = z_s / T, v = z_t / T (of standardised logits where
// asked for), q = softmax(u), p = softmax(v). Every sum leaves the label out, so that nothing cancels.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FASTKD_ROW_FUNCTION __host__ __device__ inline
#else
// Internal linkage, and no member functions: code compiled for a newer instruction set in one source file must
// not be linked into another.
#define FASTKD_ROW_FUNCTION static inline
#endif

namespace fastkd {

// Below this a logit is a masked class; see MASKED in fastkd/reference.py.
constexpr float kMasked = -1e30f;
constexpr float kStandardizeEpsilon = 1e-7f;

// What a formula needs of the sweeps beyond the sums at its temperature. Each costs its own work a class.
enum Needs : unsigned {
  kPlainStudent = 1,   // the student's exponentials at T = 1
  kPlainTeacher = 2,   // the teacher's sum at T = 1
  kTeacherEntropy = 4, // the teacher's sum of exp(v - max v) (v - max v)
  kTilt = 8,           // gradient with a term exp(u) (v - u), and the sum of it
  kOwnSlopes = 16,     // u and v of different slope
  kStandardized = 32,  // and of different mean; the gradient gains an affine term
};

// How one model's logits enter the softmax: u = (z - mean) * slope.
template <class Real>
struct RowScale {
  Real slope, mean, deviation;
};

// Sums over a part of a row, relative to the largest logits seen in it, or to others not far below.
template <class Real>
struct SoftmaxStatistics {
  float max_s, max_t;       // what they are relative to, in units of z
  Real sum_s, sum_t;        // sum exp(u - max u), sum exp(v - max v)
  Real dot_s, dot_t;        // sum exp(u - max u) (v - u), sum exp(v - max v) (v - u)
  Real moment_s, moment_t;  // sum exp(u - max u) u, sum exp(v - max v) u: for standardised logits
  Real entropy_t;           // sum exp(v - max v) (v - max v)
  Real plain_s, plain_t;    // sum exp(z - max z), at T = 1
  Real logit_sum;           // sum z_s, the label included: label smoothing
};

struct RowLabel {
  bool present;
  float z_s, z_t;
};

// Sums are taken relative to a logit near the largest one seen: rebasing them is worth it only when a logit exceeds
// that base by so much. e^8 times a million classes is far from overflow, and as exact. `plain`: exponentials at
// T = 1 are taken too.
template <class Real>
FASTKD_ROW_FUNCTION Real headroom(bool plain, Real slope) {
  return 8 / (plain && slope < 1 ? Real(1) : slope);
}

// Brings sums that are relative to smaller largest logits to the larger ones of the next part. Sums that kNeeds does
// not ask for may be left as they are.
template <unsigned kNeeds = ~0u, class Real>
FASTKD_ROW_FUNCTION void rebase(SoftmaxStatistics<Real>& row, float max_s, float max_t, Real slope_s, Real slope_t) {
  if (max_s != row.max_s && row.sum_s != 0) {
    const Real below = Real(row.max_s) - Real(max_s), factor = std::exp(below * slope_s);
    row.sum_s *= factor;
    if (kNeeds & kTilt) row.dot_s *= factor;
    if (kNeeds & kStandardized) row.moment_s *= factor;
    if (kNeeds & kPlainStudent && row.plain_s != 0) row.plain_s *= std::exp(below);
  }
  if (max_t != row.max_t && row.sum_t != 0) {
    const Real below = Real(row.max_t) - Real(max_t), shift = below * slope_t, factor = std::exp(shift);
    if (kNeeds & kTeacherEntropy) row.entropy_t = factor * (row.entropy_t + shift * row.sum_t);
    row.sum_t *= factor, row.dot_t *= factor;
    if (kNeeds & kStandardized) row.moment_t *= factor;
    if (kNeeds & kPlainTeacher && row.plain_t != 0) row.plain_t *= std::exp(below);
  }
  row.max_s = max_s;
  row.max_t = max_t;
}

// Adds the sums of a part that is relative to the same largest logits.
template <class Real>
FASTKD_ROW_FUNCTION void add_sums(SoftmaxStatistics<Real>& row, const SoftmaxStatistics<Real>& part) {
  row.sum_s += part.sum_s, row.sum_t += part.sum_t;
  row.dot_s += part.dot_s, row.dot_t += part.dot_t;
  row.moment_s += part.moment_s, row.moment_t += part.moment_t;
  row.entropy_t += part.entropy_t;
  row.plain_s += part.plain_s, row.plain_t += part.plain_t;
  row.logit_sum += part.logit_sum;
}

// What a log odds x means: sigmoid(x), sigmoid(-x) and softplus(x) = -log sigmoid(-x), from one exponential.
template <class Real>
struct Odds {
  Real yes, no, softplus;
};

template <class Real>
FASTKD_ROW_FUNCTION Odds<Real> from_log_odds(Real x) {
  const Real e = std::exp(x > 0 ? -x : x), surer = 1 / (1 + e), other = e * surer;
  return x > 0 ? Odds<Real>{surer, other, x + std::log1p(e)} : Odds<Real>{other, surer, std::log1p(e)};
}

}  // namespace fastkd

// What is computed once a row: statistics that combine, and the formulas that turn them into a loss and the
// few numbers of its gradient. Plain scalar code, shared by the CPU and CUDA kernels.
//
// Notation: z logits, y the label, T the temperature, u = z_s / T, v = z_t / T (of standardised logits where
// asked for), q = softmax(u), p = softmax(v). Every sum leaves the label out, so that nothing cancels.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FASTKD_ROW_FUNCTION __host__ __device__ inline
#else
#define FASTKD_ROW_FUNCTION static inline
#endif

namespace fastkd {

// Below this a logit is a masked class; see MASKED in fastkd/reference.py.
constexpr float kMasked = -1e30f;
constexpr float kStandardizeEpsilon = 1e-7f;

struct SoftmaxOptions {
  float temperature, ce_weight, kd_weight, tckd_weight, nckd_weight, label_smoothing;
  bool standardized;
};

// Free functions of internal linkage, here and below: a member function could be compiled for a newer
// instruction set in one source file and linked into another.
FASTKD_ROW_FUNCTION bool distils(const SoftmaxOptions& options) {
  return options.kd_weight != 0 || options.tckd_weight != 0 || options.nckd_weight != 0;
}

// How one model's logits enter the softmax: u = (z - mean) * slope.
template <class Real>
struct RowScale {
  Real slope, mean, deviation;
};

// Sums over a part of a row, relative to the largest logits seen in it. Parts combine in any order.
template <class Real>
struct SoftmaxStatistics {
  float max_s, max_t;      // largest logits, in units of z
  Real sum_s, sum_t;       // sum exp(u - max u), sum exp(v - max v)
  Real dot;                // sum exp(v - max v) (v - u)
  Real moment_s, moment_t; // sum exp(u - max u) u, sum exp(v - max v) u: for standardised logits
  Real sum_1;              // sum exp(z_s - max z_s): cross-entropy at T = 1
  Real logit_sum;          // sum z_s, the label included: label smoothing
};

template <class Real>
struct SoftmaxGradient {
  // g_i = student e^{u_i - max u} - teacher e^{v_i - max v} + cross_entropy e^{z_i - max z} + constant
  //       + affine (z_i - mean), and g_y = label.
  Real student, teacher, cross_entropy, constant, affine, label;
};

template <class Real>
struct SoftmaxResult {
  Real loss;
  Real terms[4];  // CE, KD, TCKD, NCKD
  SoftmaxGradient<Real> gradient;
};

struct RowLabel {
  bool present;
  float z_s, z_t;
};

// Brings sums that are relative to smaller largest logits to the larger ones of the next part.
template <class Real>
FASTKD_ROW_FUNCTION void rebase(SoftmaxStatistics<Real>& row, float max_s, float max_t, Real slope_s, Real slope_t) {
  if (max_s != row.max_s) {
    const Real below = Real(row.max_s) - Real(max_s), factor = std::exp(below * slope_s);
    row.moment_s *= factor;
    row.sum_s *= factor;
    row.sum_1 *= std::exp(below);
    row.max_s = max_s;
  }
  if (max_t != row.max_t) {
    const Real factor = std::exp((Real(row.max_t) - Real(max_t)) * slope_t);
    row.moment_t *= factor;
    row.sum_t *= factor;
    row.dot *= factor;
    row.max_t = max_t;
  }
}

template <class Real>
FASTKD_ROW_FUNCTION Real softplus(Real x) {
  return (x > 0 ? x : 0) + std::log1p(std::exp(x > 0 ? -x : x));
}

template <class Real>
FASTKD_ROW_FUNCTION Real sigmoid(Real x) {
  const Real e = std::exp(x > 0 ? -x : x);
  return (x > 0 ? 1 : e) / (1 + e);
}

// w_ce CE + T^2 (w_kd KD + w_t TCKD + w_n NCKD) from the statistics of a row; derivation in docs/formulas.md.
template <class Real>
FASTKD_ROW_FUNCTION SoftmaxResult<Real> softmax_family(const SoftmaxOptions& options,
                                                       const SoftmaxStatistics<Real>& row, const RowLabel& label,
                                                       const RowScale<Real>& student, const RowScale<Real>& teacher,
                                                       int64_t classes) {
  const Real temperature = options.temperature, square = temperature * temperature;
  const Real w_ce = options.ce_weight, w_kd = options.kd_weight;
  const Real w_t = options.tckd_weight, w_n = options.nckd_weight;
  SoftmaxResult<Real> result{};
  SoftmaxGradient<Real>& gradient = result.gradient;

  if (distils(options)) {
    // Differences of logits come before the logarithms: large logits must not swallow them.
    const Real log_s = std::log(row.sum_s), log_t = std::log(row.sum_t);
    const Real max_v_minus_u = options.standardized ? (row.max_t - teacher.mean) * teacher.slope -
                                                          (row.max_s - student.mean) * student.slope
                                                    : (Real(row.max_t) - Real(row.max_s)) * student.slope;
    const Real nckd = row.dot / row.sum_t - max_v_minus_u - (log_t - log_s);
    // Without a label nothing is left out, and KD is NCKD over all classes.
    Real q = 0, p = 0, q_rest = 1, p_rest = 1, tckd = 0, label_u = 0;
    if (label.present) {
      label_u = (Real(label.z_s) - student.mean) * student.slope;
      const Real odds_s = (Real(label.z_s) - Real(row.max_s)) * student.slope - log_s;
      const Real odds_t = (Real(label.z_t) - Real(row.max_t)) * teacher.slope - log_t;
      q = sigmoid(odds_s), q_rest = sigmoid(-odds_s);
      p = sigmoid(odds_t), p_rest = sigmoid(-odds_t);
      tckd = p * (odds_t - odds_s) + softplus(odds_s) - softplus(odds_t);
    }
    const Real kd = tckd + p_rest * nckd;
    result.terms[1] = w_kd != 0 ? square * kd : 0;
    result.terms[2] = w_t != 0 ? square * tckd : 0;
    result.terms[3] = w_n != 0 ? square * nckd : 0;

    gradient.student = temperature / row.sum_s * (w_kd * q_rest + w_t * (p - q) + w_n);
    gradient.teacher = temperature / row.sum_t * (w_kd * p_rest + w_n);
    gradient.label = temperature * (w_kd + w_t) * (q - p);
    if (options.standardized) {
      // G = sum g_i x_i over the standardised logits x = T u.
      const Real inverse = student.slope * temperature;
      const Real along = temperature * (gradient.student * row.moment_s - gradient.teacher * row.moment_t +
                                        gradient.label * label_u);
      gradient.affine =
          student.deviation > 0 ? -along * inverse / (Real(classes - 1) * student.deviation) : Real(0);
      gradient.student *= inverse;
      gradient.teacher *= inverse;
      gradient.label *= inverse;
      if (label.present) gradient.label += gradient.affine * (label.z_s - student.mean);
    }
  }

  if (w_ce != 0) {
    const Real smoothing = options.label_smoothing;
    const Real odds = (Real(label.z_s) - Real(row.max_s)) - std::log(row.sum_1);
    const Real rest = sigmoid(-odds);
    result.terms[0] = softplus(-odds) + smoothing * (label.z_s - row.logit_sum / classes);
    gradient.cross_entropy = w_ce * rest / row.sum_1;
    gradient.constant = -w_ce * smoothing / classes;
    gradient.label += w_ce * (smoothing - rest) + gradient.constant;
  }
  result.loss = w_ce * result.terms[0] + w_kd * result.terms[1] + w_t * result.terms[2] + w_n * result.terms[3];
  return result;
}

}  // namespace fastkd

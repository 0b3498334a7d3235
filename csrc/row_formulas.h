// The row formulas: from the statistics of a row to its loss and the few numbers of its gradient. Scalar code, once
// a row; docs/formulas.md derives it. A new loss of the softmax family is a formula here and its needs.
#pragma once

#include "row_math.h"

namespace fastkd {

enum class Loss : int32_t { kSoftmax, kNKD, kTTM, kReverseKL, kJSD, kBinaryKL, kBinaryKLNorm };

constexpr int kOptions = 8;
constexpr int kTerms = 4;

// The options of a loss, in the order of fastkd/reference.py.
struct SoftmaxOptions {
  float temperature, ce_weight, kd_weight, tckd_weight, nckd_weight, label_smoothing, standardized, one_sided;
};
struct NKDOptions {
  float temperature, gamma;
};
struct TTMOptions {
  float gamma, weighted;
};

struct LossOptions {
  Loss loss;
  union {
    float values[kOptions];
    SoftmaxOptions softmax;
    NKDOptions nkd;
    TTMOptions ttm;
  };
};

template <class Real>
struct SoftmaxGradient {
  // g_i = (student + tilt (v_i - u_i)) e^{u_i} - teacher e^{v_i} + plain e^{z_i} + constant + affine (z_i - mean),
  // u, v and z_i of the exponentials relative to the bases; and g_y = label.
  Real student, teacher, plain, constant, affine, tilt, label;
};

template <class Real>
struct SoftmaxResult {
  Real loss;
  Real terms[4];  // CE, KD, TCKD, NCKD
  SoftmaxGradient<Real> gradient;
};

template <class Real>
struct Row {
  SoftmaxStatistics<Real> sums;
  RowLabel label;
  RowScale<Real> student, teacher;
  float origin;  // of the student's logits in logit_sum: any of them
  int64_t classes;
};

// Whether a softmax at temperature T is a part of the loss, beside the cross-entropy at T = 1.
FASTKD_ROW_FUNCTION bool distils(const SoftmaxOptions& options) {
  return options.kd_weight != 0 || options.tckd_weight != 0 || options.nckd_weight != 0;
}

FASTKD_ROW_FUNCTION unsigned needs_of(const LossOptions& options) {
  switch (options.loss) {
    case Loss::kSoftmax: {
      const bool standardized = options.softmax.standardized != 0 && distils(options.softmax);
      // At T = 1 the exponentials of the cross-entropy are the student's own.
      const bool plain = options.softmax.ce_weight != 0 && (options.softmax.temperature != 1 || standardized);
      return (plain ? kPlainStudent : 0u) | (standardized ? kOwnSlopes | kStandardized : 0u);
    }
    case Loss::kNKD:
      return kCrossEntropy | (options.nkd.temperature != 1 ? kPlainStudent | kPlainTeacher : 0u);
    case Loss::kTTM: return kOwnSlopes | kPlainTeacher;
    case Loss::kReverseKL: return kTilt;
    case Loss::kJSD:
    case Loss::kBinaryKL:
    case Loss::kBinaryKLNorm: return 0;
  }
  return ~0u;  // no loss; nothing is compiled for it
}

FASTKD_ROW_FUNCTION bool smooths_label(const LossOptions& options) {
  return options.loss == Loss::kSoftmax && options.softmax.label_smoothing != 0;
}

// A cross-entropy alone does not: there a teacher's NaN is nobody's.
FASTKD_ROW_FUNCTION bool reads_teacher(const LossOptions& options) {
  return options.loss != Loss::kSoftmax || distils(options.softmax);
}

FASTKD_ROW_FUNCTION bool uses_label(const LossOptions& options) {
  return options.loss == Loss::kSoftmax || options.loss == Loss::kNKD;
}

// 1 / T of student and teacher.
template <class Real>
FASTKD_ROW_FUNCTION void slopes_of(const LossOptions& options, Real& student, Real& teacher) {
  student = teacher = 1 / Real(options.values[0]);
  if (options.loss == Loss::kTTM) student = 1, teacher = options.ttm.gamma;
}

// KL(p-hat || q-hat) over the classes of the sums: NCKD / T^2 with a label, KD / T^2 without.
template <class Real>
FASTKD_ROW_FUNCTION Real forward_kl(const Row<Real>& row) {
  return row.sums.dot_t / row.sums.sum_t - log_ratio(row.sums.sum_t, row.sums.sum_s);
}

// What stands for a masked class: kMasked, or what a large slope does not bring out of range. Of a standardised row
// without spread the slope is 1e7 / T, and its padding would be -inf.
template <class Real>
FASTKD_ROW_FUNCTION float masked_value(const Row<Real>& row) {
  const Real slope = row.student.slope > row.teacher.slope ? row.student.slope : row.teacher.slope;
  return slope > Real(1e6) ? float(Real(-1e36) / slope) : kMasked;
}

// The label's logit relative to the base, and to the mean.
template <class Real>
FASTKD_ROW_FUNCTION Real above_base(float z, float base) {
  return Real(z) - Real(base);
}
template <class Real>
FASTKD_ROW_FUNCTION Real above_mean(float z, const RowScale<Real>& scale) {
  return (Real(z) - scale.mean) - scale.mean_rest;
}

// w_ce CE + T^2 (w_kd KD + w_t TCKD + w_n NCKD); with one_sided, TCKD only where the teacher is the surer.
template <class Real>
FASTKD_ROW_FUNCTION SoftmaxResult<Real> softmax_formula(const SoftmaxOptions& options, const Row<Real>& row) {
  const Real temperature = options.temperature, square = temperature * temperature;
  const Real w_ce = options.ce_weight, w_kd = options.kd_weight, w_n = options.nckd_weight;
  const SoftmaxStatistics<Real>& sums = row.sums;
  SoftmaxResult<Real> result{};
  SoftmaxGradient<Real>& gradient = result.gradient;

  if (distils(options)) {
    const Real nckd = forward_kl(row);
    // Without a label nothing is left out, and KD is NCKD over all classes.
    Real q = 0, p = 0, q_rest = 1, p_rest = 1, tckd = 0, gate = 1;
    if (row.label.present) {
      const Real u = above_base<Real>(row.label.z_s, sums.max_s) * row.student.slope;
      const Real v = above_base<Real>(row.label.z_t, sums.max_t) * row.teacher.slope;
      const Real difference = (v - u) - log_ratio(sums.sum_t, sums.sum_s);
      const Odds<Real> of_student = from_log_odds(u - std::log(sums.sum_s));
      const Odds<Real> of_teacher = from_log_odds(v - std::log(sums.sum_t));
      q = of_student.yes, q_rest = of_student.no;
      p = of_teacher.yes, p_rest = of_teacher.no;
      tckd = binary_divergence(of_teacher, of_student, difference);
      gate = options.one_sided != 0 && !(difference > 0) ? 0 : 1;
    }
    const Real w_t = options.tckd_weight * gate;
    const Real kd = tckd + p_rest * nckd;
    result.terms[1] = w_kd != 0 ? square * kd : 0;
    result.terms[2] = options.tckd_weight != 0 ? square * gate * tckd : 0;
    result.terms[3] = w_n != 0 ? square * nckd : 0;

    gradient.student = temperature / sums.sum_s * (w_kd * q_rest + w_t * (p - q) + w_n);
    gradient.teacher = temperature / sums.sum_t * (w_kd * p_rest + w_n);
    gradient.label = temperature * (w_kd + w_t) * (q - p);
    if (options.standardized != 0) {
      // G = sum g_i x_i over the standardised logits x.
      const Real inverse = row.student.slope * temperature;
      const Real label_z = row.label.present ? above_mean(row.label.z_s, row.student) : Real(0);
      const Real along = inverse * (gradient.student * sums.moment_s - gradient.teacher * sums.moment_t +
                                    gradient.label * label_z);
      gradient.affine = row.student.deviation > 0
                            ? -along * inverse / (Real(row.classes - 1) * row.student.deviation)
                            : Real(0);
      gradient.student *= inverse;
      gradient.teacher *= inverse;
      gradient.label = gradient.label * inverse + gradient.affine * label_z;
    }
  }

  if (w_ce != 0) {
    const Real smoothing = options.label_smoothing;
    const Odds<Real> of_rest =
        from_log_odds(std::log(sums.plain_s) - above_base<Real>(row.label.z_s, sums.max_s));
    const Real rest = of_rest.yes;
    result.terms[0] = of_rest.softplus;
    if (smoothing != 0)
      result.terms[0] += smoothing * (above_base<Real>(row.label.z_s, row.origin) - sums.logit_sum / row.classes);
    gradient.plain = w_ce * rest / sums.plain_s;
    gradient.constant = -w_ce * smoothing / row.classes;
    gradient.label += w_ce * (smoothing - rest) + gradient.constant;
  }
  result.loss = w_ce * result.terms[0] + w_kd * result.terms[1] + options.tckd_weight * result.terms[2] +
                w_n * result.terms[3];
  return result;
}

// -p_y log q_y at T = 1, minus gamma T^2 sum over i != y of p-hat_i log q-hat_i.
template <class Real>
FASTKD_ROW_FUNCTION SoftmaxResult<Real> nkd_formula(const NKDOptions& options, const Row<Real>& row) {
  const SoftmaxStatistics<Real>& sums = row.sums;
  const Real temperature = options.temperature, gamma = options.gamma;
  const Odds<Real> of_rest = from_log_odds(std::log(sums.plain_s) - above_base<Real>(row.label.z_s, sums.max_s));
  const Odds<Real> of_label = from_log_odds(above_base<Real>(row.label.z_t, sums.max_t) - std::log(sums.plain_t));
  const Real p = of_label.yes, rest = of_rest.yes;
  // Both terms are positive but for what lies above the base: nothing to cancel.
  const Real cross = std::log(sums.sum_s) - sums.cross_t / sums.sum_t;
  SoftmaxResult<Real> result{};
  result.loss = p * of_rest.softplus + gamma * temperature * temperature * cross;
  result.gradient.student = gamma * temperature / sums.sum_s;
  result.gradient.teacher = gamma * temperature / sums.sum_t;
  result.gradient.plain = p * rest / sums.plain_s;
  result.gradient.label = -p * rest;
  return result;
}

// KL(softmax(gamma z_t) || softmax(z_s)), weighted by w = sum_i softmax(z_t)_i^gamma.
template <class Real>
FASTKD_ROW_FUNCTION SoftmaxResult<Real> ttm_formula(const TTMOptions& options, const Row<Real>& row) {
  const SoftmaxStatistics<Real>& sums = row.sums;
  const Real weight =
      options.weighted != 0 ? std::exp(std::log(sums.sum_t) - options.gamma * std::log(sums.plain_t)) : Real(1);
  SoftmaxResult<Real> result{};
  result.loss = weight * forward_kl(row);
  result.gradient.student = weight / sums.sum_s;
  result.gradient.teacher = weight / sums.sum_t;
  return result;
}

// KL(q || p); its gradient is q_i (d_i - KL) / T with d = log q - log p.
template <class Real>
FASTKD_ROW_FUNCTION SoftmaxResult<Real> reverse_kl_formula(const Row<Real>& row) {
  const SoftmaxStatistics<Real>& sums = row.sums;
  const Real scale = row.student.slope / sums.sum_s;
  SoftmaxResult<Real> result{};
  result.loss = log_ratio(sums.sum_t, sums.sum_s) - sums.dot_s / sums.sum_s;
  result.gradient.student = scale * (sums.dot_s / sums.sum_s);
  result.gradient.tilt = -scale;
  return result;
}

// The result of a row that cannot be computed.
template <class Real>
FASTKD_ROW_FUNCTION SoftmaxResult<Real> undefined_result() {
  const Real nan = Real(NAN);
  SoftmaxResult<Real> result{};
  result.loss = result.gradient.student = result.gradient.label = nan;
  for (Real& term : result.terms) term = nan;
  return result;
}

template <Loss kLoss, class Real>
FASTKD_ROW_FUNCTION SoftmaxResult<Real> formula_of(const LossOptions& options, const Row<Real>& row) {
  static_assert(kLoss == Loss::kSoftmax || kLoss == Loss::kNKD || kLoss == Loss::kTTM || kLoss == Loss::kReverseKL,
                "no loss of the softmax family");
  // A label's NaN or +inf is in no sum, and not in every term.
  const bool finite = row.label.z_s - row.label.z_s == 0 && row.label.z_t - row.label.z_t == 0;
  if (row.label.present && !finite) return undefined_result<Real>();
  if (kLoss == Loss::kNKD) return nkd_formula(options.nkd, row);
  if (kLoss == Loss::kTTM) return ttm_formula(options.ttm, row);
  if (kLoss == Loss::kReverseKL) return reverse_kl_formula(row);
  return softmax_formula(options.softmax, row);
}

}  // namespace fastkd

// The losses: name, options and formula of each. Formulas are scalar code per row, or code per class, compiled for CPU
// vectors and for GPU threads; docs/formulas.md derives them.
//
// A loss is a struct here, an entry of `Losses` and one of LOSSES in fastkd/ops/spec.py. The skeletons of its family
// (softmax_rows.h, mixture_rows.h or pointwise_rows.h in cpu/ and cuda/) do the rest.
#pragma once

#include "loss_list.h"

namespace fastkd {

// ---- the softmax family: from the statistics of a row to its loss and the coefficients of its gradient ----------

template <class Real>
struct SoftmaxGradient {
  // g_i = (student + log_ratio (v_i - u_i)) e^{u_i} - teacher e^{v_i} + student_t1 e^{z_i} + constant
  //       + affine (z_i - mean), with u, v and z_i in the exponentials relative to the bases; and g_y = label.
  Real student, teacher, student_t1, constant, affine, log_ratio, label;
};

template <class Real>
struct SoftmaxResult {
  Real loss;
  Real terms[kTerms];
  SoftmaxGradient<Real> gradient;
};

template <class Real>
struct Row {
  SoftmaxStatistics<Real> sums;
  RowLabel label;
  RowScale<Real> student, teacher;
  float origin;  // one of the student's logits: logit_sum is relative to it
  int64_t classes;
};

// 1 / T of student and teacher. With kOwnSlopes alone (TTM), the first option is the teacher's slope, the student's is
// 1.
template <class Real>
FASTKD_ROW_FUNCTION void slopes_of(const LossOptions& options, Real& student, Real& teacher) {
  student = teacher = 1 / Real(options.values[0]);
  if ((options.needs & kOwnSlopes) && !(options.needs & kStandardized)) student = 1, teacher = options.values[0];
}

// KL(p-hat || q-hat) over the classes of the sums: NCKD / T^2 with a label, KD / T^2 without.
template <class Real>
FASTKD_ROW_FUNCTION Real forward_kl(const Row<Real>& row) {
  return row.sums.dot_t / row.sums.sum_t - log_ratio(row.sums.sum_t, row.sums.sum_s);
}

// The value of a masked class: kMasked, or smaller if the slope would take it out of range. The slope of a constant
// standardised row is 1e7 / T, which would turn padding into -inf.
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

// w_ce CE + T^2 (w_kd KD + w_t TCKD + w_n NCKD); with fix_acquired, TCKD only where the teacher is more confident in
// the target class.
struct Softmax {
  static constexpr const char* kName = "softmax";
  typedef SoftmaxFamily Family;
  FASTKD_OPTIONS(temperature, ce_weight, kd_weight, tckd_weight, nckd_weight, label_smoothing, standardize,
                 fix_acquired);
  typedef VariantList<0, kStudentAtT1, kOwnSlopes | kStandardized, kOwnSlopes | kStandardized | kStudentAtT1> Variants;

  template <class Real>
  FASTKD_FORMULA SoftmaxResult<Real> formula(const Options& options, unsigned needs, const Row<Real>& row) {
    const Real temperature = options.temperature, square = temperature * temperature;
    const Real w_ce = options.ce_weight, w_kd = options.kd_weight, w_n = options.nckd_weight;
    const SoftmaxStatistics<Real>& sums = row.sums;
    SoftmaxResult<Real> result{};
    SoftmaxGradient<Real>& gradient = result.gradient;

    if (needs & kDistills) {
      const Real nckd = forward_kl(row);
      // Without a label no class is excluded: KD is NCKD over all classes.
      Real q_minus_p = 0, q_rest = 1, p_rest = 1, tckd = 0, gate = 1;
      if (row.label.present) {
        const Real u = rounded(above_base<Real>(row.label.z_s, sums.max_s) * row.student.slope);
        const Real v = rounded(above_base<Real>(row.label.z_t, sums.max_t) * row.teacher.slope);
        const Real difference = (v - u) - log_ratio(sums.sum_t, sums.sum_s);
        const Odds<Real> student_odds = from_log_odds(u - std::log(sums.sum_s));
        const Odds<Real> teacher_odds = from_log_odds(v - std::log(sums.sum_t));
        q_rest = student_odds.no, p_rest = teacher_odds.no;
        q_minus_p = difference_of(student_odds, teacher_odds, difference);
        tckd = binary_divergence(teacher_odds, student_odds, difference);
        gate = options.fix_acquired != 0 && !(difference > 0) ? 0 : 1;
      }
      const Real w_t = options.tckd_weight * gate;
      const Real kd = tckd + p_rest * nckd;
      result.terms[1] = w_kd != 0 ? square * kd : 0;
      result.terms[2] = options.tckd_weight != 0 ? square * gate * tckd : 0;
      result.terms[3] = w_n != 0 ? square * nckd : 0;

      gradient.student = temperature / sums.sum_s * (rounded(w_kd * q_rest) - w_t * q_minus_p + w_n);
      gradient.teacher = temperature / sums.sum_t * (rounded(w_kd * p_rest) + w_n);
      gradient.label = temperature * (w_kd + w_t) * q_minus_p;
      if (needs & kStandardized) {
        // G = sum g_i x_i over the standardised logits x.
        const Real inverse = row.student.slope * temperature;
        const Real label_z = row.label.present ? above_mean(row.label.z_s, row.student) : Real(0);
        const Real along = inverse * (rounded(gradient.student * sums.moment_s) -
                                      rounded(gradient.teacher * sums.moment_t) + gradient.label * label_z);
        gradient.affine =
            row.student.deviation > 0 ? -along * inverse / (Real(row.classes - 1) * row.student.deviation) : Real(0);
        gradient.student *= inverse;
        gradient.teacher *= inverse;
        gradient.label = gradient.label * inverse + gradient.affine * label_z;
      }
    }

    if (needs & kCrossEntropy) {
      const Real smoothing = options.label_smoothing;
      const Odds<Real> rest_odds = from_log_odds(std::log(sums.t1_s) - above_base<Real>(row.label.z_s, sums.max_s));
      const Real rest = rest_odds.yes;
      result.terms[0] = w_ce != 0 ? rest_odds.softplus : 0;
      if (smoothing != 0 && w_ce != 0)
        result.terms[0] += smoothing * (above_base<Real>(row.label.z_s, row.origin) - sums.logit_sum / row.classes);
      gradient.student_t1 = w_ce * rest / sums.t1_s;
      gradient.constant = -w_ce * smoothing / row.classes;
      gradient.label += w_ce * (smoothing - rest) + gradient.constant;
    }
    result.loss =
        w_ce * result.terms[0] + w_kd * result.terms[1] + options.tckd_weight * result.terms[2] + w_n * result.terms[3];
    return result;
  }
};

// The options of the terms that a teacher known at K classes has: without those of the student's logits alone.
FASTKD_ROW_FUNCTION LossOptions options_at_k(const LossOptions& options, uint32_t needs) {
  LossOptions result = options;
  result.needs = needs;
  if (options.needs & kCrossEntropy) {  // the loss is Softmax
    Softmax::Options values = options_as<Softmax>(options);
    values.ce_weight = values.label_smoothing = 0;
    memcpy(result.values, &values, sizeof values);
  }
  return result;
}

// -p_y log q_y at T = 1, minus gamma T^2 sum over i != y of p-hat_i log q-hat_i.
struct NKD {
  static constexpr const char* kName = "nkd";
  typedef SoftmaxFamily Family;
  FASTKD_OPTIONS(temperature, gamma);
  typedef VariantList<kCrossTerm, kCrossTerm | kStudentAtT1 | kTeacherAtT1> Variants;

  template <class Real>
  FASTKD_FORMULA SoftmaxResult<Real> formula(const Options& options, unsigned, const Row<Real>& row) {
    const SoftmaxStatistics<Real>& sums = row.sums;
    const Real temperature = options.temperature, gamma = options.gamma;
    const Odds<Real> rest_odds = from_log_odds(std::log(sums.t1_s) - above_base<Real>(row.label.z_s, sums.max_s));
    const Odds<Real> label_odds = from_log_odds(above_base<Real>(row.label.z_t, sums.max_t) - std::log(sums.t1_t));
    const Real p = label_odds.yes, rest = rest_odds.yes;
    // Both terms are positive, up to logits above the base: no cancellation.
    const Real cross = std::log(sums.sum_s) - sums.cross_t / sums.sum_t;
    SoftmaxResult<Real> result{};
    result.loss = p * rest_odds.softplus + gamma * temperature * temperature * cross;
    result.gradient.student = gamma * temperature / sums.sum_s;
    result.gradient.teacher = gamma * temperature / sums.sum_t;
    result.gradient.student_t1 = p * rest / sums.t1_s;
    result.gradient.label = -p * rest;
    return result;
  }
};

// KL(softmax(gamma z_t) || softmax(z_s)), weighted by w = sum_i softmax(z_t)_i^gamma.
struct TTM {
  static constexpr const char* kName = "ttm";
  typedef SoftmaxFamily Family;
  FASTKD_OPTIONS(gamma, weighted);
  typedef VariantList<kOwnSlopes | kTeacherAtT1> Variants;

  template <class Real>
  FASTKD_FORMULA SoftmaxResult<Real> formula(const Options& options, unsigned, const Row<Real>& row) {
    const SoftmaxStatistics<Real>& sums = row.sums;
    const Real weight =
        options.weighted != 0 ? std::exp(std::log(sums.sum_t) - options.gamma * std::log(sums.t1_t)) : Real(1);
    SoftmaxResult<Real> result{};
    result.loss = weight * forward_kl(row);
    result.gradient.student = weight / sums.sum_s;
    result.gradient.teacher = weight / sums.sum_t;
    return result;
  }
};

// KL(q || p); its gradient is q_i (d_i - KL) / T with d = log q - log p.
struct ReverseKL {
  static constexpr const char* kName = "reverse_kl";
  typedef SoftmaxFamily Family;
  FASTKD_OPTIONS(temperature);
  typedef VariantList<kLogRatio> Variants;

  template <class Real>
  FASTKD_FORMULA SoftmaxResult<Real> formula(const Options&, unsigned, const Row<Real>& row) {
    const SoftmaxStatistics<Real>& sums = row.sums;
    const Real scale = row.student.slope / sums.sum_s;
    SoftmaxResult<Real> result{};
    result.loss = log_ratio(sums.sum_t, sums.sum_s) - sums.dot_s / sums.sum_s;
    result.gradient.student = scale * (sums.dot_s / sums.sum_s);
    result.gradient.log_ratio = -scale;
    return result;
  }
};

// The result for a label whose logit is not finite: NaN.
template <class Real>
FASTKD_ROW_FUNCTION SoftmaxResult<Real> undefined_result() {
  const Real nan = Real(NAN);
  SoftmaxResult<Real> result{};
  result.loss = result.gradient.student = result.gradient.label = nan;
  for (Real& term : result.terms) term = nan;
  return result;
}

template <class Loss, class Real>
FASTKD_ROW_FUNCTION SoftmaxResult<Real> formula_of(const LossOptions& options, const Row<Real>& row) {
  // The label is excluded from all sums, so its NaN or +inf would not reach every term.
  const bool finite = row.label.z_s - row.label.z_s == 0 && row.label.z_t - row.label.z_t == 0;
  if (row.label.present && !finite) return undefined_result<Real>();
  return Loss::formula(options_as<Loss>(options), options.needs, row);
}

// ---- the mixture family: a sum over classes of a function of q and p --------------------------------------------

// Code per class is generic in the number type V (a vector on the CPU, a float on the GPU) and its functions M:
// VectorMath of cpu/vector.h, ScalarMath of cuda/scalar_math.h.

// The class's contribution to the row loss, and q h with h the derivative of the loss in q. The gradient is
// q (h_i - mean of h under q) / T, so h may be given relative to an origin, in which nothing cancels. With two origins each
// class has the one that it is near to: `shifted` is q at the second, origin_step() above the first, and 0 at the first.
template <class V>
struct MixtureTerm {
  V value, weighted_slope, shifted;
};

// A loss of one origin.
struct OneOrigin {
  static constexpr bool kTwoOrigins = false;
  template <class Options>
  FASTKD_FORMULA float origin_step(const Options&) {
    return 0.0f;
  }
};

// m = weight_p p + weight_q q with weight_p + weight_q = 1, computed from p - q: exactly q at p = q, so that log(q / m)
// is 0 there.
template <class M, class V>
FASTKD_FORMULA V mixture_of(float weight_p, float weight_q, V q, V p, V difference) {
  return weight_p <= 0.5f ? M::fused(difference, M::number(weight_p), q)
                          : M::fused(difference, M::number(-weight_q), p);
}

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; h = (1 - beta) log(q / m).
struct JSD : OneOrigin {
  static constexpr const char* kName = "jsd";
  typedef MixtureFamily Family;
  FASTKD_OPTIONS(temperature, beta, rest);

  // `difference` is p - q.
  template <class M, class V>
  FASTKD_FORMULA MixtureTerm<V> formula(const Options& options, V q, V p, V difference) {
    const float beta = options.beta, rest = options.rest;
    const V m = mixture_of<M>(beta, rest, q, p, difference);
    const V q_log = M::times_log_ratio(q, m, -beta * difference);
    const V p_log = M::times_log_ratio(p, m, rest * difference);
    const V slope = rest * q_log;
    return {M::fused(M::number(beta), p_log, slope), slope, M::number(0.0f)};
  }
};

// 1/2 |p - q|; h = 1/2 sign(q - p), relative to 1/2, and to -1/2 where p > q.
struct TVD {
  static constexpr const char* kName = "tvd";
  static constexpr bool kTwoOrigins = true;
  typedef MixtureFamily Family;
  FASTKD_OPTIONS(temperature);

  FASTKD_FORMULA float origin_step(const Options&) { return -1.0f; }
  template <class M, class V>
  FASTKD_FORMULA MixtureTerm<V> formula(const Options&, V q, V, V difference) {
    const V none = M::number(0.0f);
    return {0.5f * M::absolute(difference), M::select(difference == 0.0f, -0.5f * q, none),
            M::select(difference > 0.0f, q, none)};
  }
};

// KL(p || m), m = skew p + (1 - skew) q; h = -(1 - skew) p / m, relative to its value at p = q unless p < q / 2.
struct SkewKL {
  static constexpr const char* kName = "skew_kl";
  static constexpr bool kTwoOrigins = true;
  typedef MixtureFamily Family;
  FASTKD_OPTIONS(temperature, skew, rest);

  FASTKD_FORMULA float origin_step(const Options& options) { return options.rest; }
  template <class M, class V>
  FASTKD_FORMULA MixtureTerm<V> formula(const Options& options, V q, V p, V difference) {
    const float rest = options.rest;
    const V m = mixture_of<M>(options.skew, rest, q, p, difference), above = rest * difference;  // p - m
    const auto far = 2.0f * p < q;
    // Adding m - p, whose sum is 0, makes every class's value positive: no cancellation near equality.
    return {M::times_log_ratio(p, m, above) - above, -rest * M::share(q * M::select(far, p, above), m),
            M::select(far, q, M::number(0.0f))};
  }
};

// KL(q || m), m = (1 - skew) p + skew q; h = log(q / m) + skew (1 - q / m).
struct SkewReverseKL : OneOrigin {
  static constexpr const char* kName = "skew_reverse_kl";
  typedef MixtureFamily Family;
  FASTKD_OPTIONS(temperature, skew, rest);

  template <class M, class V>
  FASTKD_FORMULA MixtureTerm<V> formula(const Options& options, V q, V p, V difference) {
    const float rest = options.rest;
    const V m = mixture_of<M>(rest, options.skew, q, p, difference), below = rest * difference;  // m - q
    const V q_log = M::times_log_ratio(q, m, -below);
    return {q_log + below, q_log + options.skew * M::share(q * below, m), M::number(0.0f)};
  }
};

// ---- the pointwise family: a sum over classes of a function of u and v, times T^2 -------------------------------

// The class's contribution to the row loss, value + log(factor), and the derivative in u. Factors are in [1/2, 1], so
// that one logarithm of a product serves many classes.
template <class V>
struct ClassTerm {
  V value, factor, slope;
};

// KL(Bern(sigmoid(v)) || Bern(sigmoid(u))) and its derivative in u, sigmoid(u) - sigmoid(v).
struct BinaryKL {
  static constexpr const char* kName = "binary_kl";
  typedef PointwiseFamily Family;
  static constexpr bool kHasFactor = false;
  FASTKD_OPTIONS(temperature);

  template <class M, class V>
  FASTKD_FORMULA ClassTerm<V> formula(V z_s, V z_t, float inverse_temperature) {
    const V u = z_s * inverse_temperature, v = z_t * inverse_temperature, one = M::number(1.0f), none = M::number(0.0f);
    const V e_u = M::exp(-M::absolute(u)), e_v = M::exp(-M::absolute(v));
    const V sigmoid_u = M::bounded_quotient(M::select(u > 0.0f, one, e_u), 1.0f + e_u);
    const V sigmoid_v = M::bounded_quotient(M::select(v > 0.0f, one, e_v), 1.0f + e_v);
    // softplus(u) - softplus(v) = max(u, 0) - max(v, 0) + log((1 + e_u) / (1 + e_v)).
    const V log_of_ratio = M::twice_atanh(M::bounded_quotient(e_u - e_v, 2.0f + e_u + e_v));
    const V hinges = M::select(u > 0.0f, u, none) - M::select(v > 0.0f, v, none);
    return {M::fused(sigmoid_v, v - u, hinges + log_of_ratio), one, sigmoid_u - sigmoid_v};
  }
};

// log cosh(x) at x = (u - v) / 2, and its derivative in u, tanh(x) / 2.
struct BinaryKLNorm {
  static constexpr const char* kName = "binary_kl_norm";
  typedef PointwiseFamily Family;
  static constexpr bool kHasFactor = true;
  FASTKD_OPTIONS(temperature);

  template <class M, class V>
  FASTKD_FORMULA ClassTerm<V> formula(V z_s, V z_t, float inverse_temperature) {
    const V x = (z_s - z_t) * (0.5f * inverse_temperature), magnitude = M::absolute(x);
    constexpr float kMinusTwoLog2E = -2.88539008f;
    const V e_minus_one = M::exp2_minus_one(magnitude * kMinusTwoLog2E);  // E = e^{-2|x|} - 1, exact near 0
    const V divisor = M::fused(e_minus_one, M::number(-2.0f), M::number(-4.0f));
    const V half_tanh = M::with_sign_of(M::bounded_quotient(e_minus_one, divisor), x);
    // |x| + log((1 + e^{-2|x|}) / 2), or a series for small |x|, where the two cancel.
    const V s = x * x;
    const V tail = M::fused(s, M::fused(s, M::number(-17.0f / 2520), M::number(1.0f / 45)), M::number(-1.0f / 12));
    const V series = s * M::fused(s, tail, M::number(0.5f));
    const auto small = magnitude < 0.2f;
    const V factor = M::select(small, M::number(1.0f), M::fused(e_minus_one, M::number(0.5f), M::number(1.0f)));
    return {M::select(small, series, magnitude), factor, half_tanh};
  }
};

// ---- the list ---------------------------------------------------------------------------------------------------

// In the order of LOSSES in fastkd/ops/spec.py.
typedef LossList<Softmax, NKD, TTM, ReverseKL, JSD, TVD, SkewKL, SkewReverseKL, BinaryKL, BinaryKLNorm> Losses;

}  // namespace fastkd

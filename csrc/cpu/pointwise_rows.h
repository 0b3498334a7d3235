// Losses that are a sum over classes of a function of two logits: one sweep, no row statistics.
#pragma once

#include "blocks.h"
#include "row_phases.h"

namespace fastkd {
namespace FASTKD_ISA {

// What a class adds to its row's loss, value + log(factor), and the derivative. A product of factors takes one
// logarithm for all of them.
struct ClassTerm {
  vf value, factor, slope;
};

// Every factor is from 1/2 to 1: a product of so many is in the normal range.
constexpr int kFactors = 64;

// KL(Bern(sigmoid(v)) || Bern(sigmoid(u))) and its derivative in u, sigmoid(u) - sigmoid(v).
FASTKD_INLINE ClassTerm binary_kl(vf u, vf v) {
  const vf e_u = exp_or_zero(-absolute(u)), e_v = exp_or_zero(-absolute(v));
  const vf sigmoid_u = select(u > 0.0f, broadcast(1.0f), e_u) / (1.0f + e_u);
  const vf sigmoid_v = select(v > 0.0f, broadcast(1.0f), e_v) / (1.0f + e_v);
  // softplus(u) - softplus(v) = max(u, 0) - max(v, 0) + log((1 + e_u) / (1 + e_v)).
  const vf log_ratio = twice_atanh((e_u - e_v) / (2.0f + e_u + e_v));
  const vf hinges = select(u > 0.0f, u, vf{}) - select(v > 0.0f, v, vf{});
  return {sigmoid_v * (v - u) + (hinges + log_ratio), broadcast(1.0f), sigmoid_u - sigmoid_v};
}

// log cosh(x) and its derivative tanh(x).
FASTKD_INLINE ClassTerm log_cosh(vf x) {
  const vf magnitude = absolute(x);
  const PowerOfTwo e = power_of_two(at_least(magnitude * float(-2 * kLog2E), broadcast(-126.0f)));
  const vf e_minus_one = e.scale * e.minus_one + (e.scale - 1.0f);  // E = e^{-2|x|} - 1, exact near 0
  const vf tanh_magnitude = e_minus_one / (-2.0f - e_minus_one);
  const vf tanh = as_float(as_int(tanh_magnitude) | (as_int(x) & int32_t(0x80000000)));
  // |x| + log((1 + e^{-2|x|}) / 2), or a series where these would cancel.
  const vf s = x * x;
  const vf series = s * (0.5f - s * (1.0f / 12 - s * (1.0f / 45 - s * (17.0f / 2520))));
  const vi small = magnitude < 0.2f;
  return {select(small, series, magnitude), select(small, broadcast(1.0f), 1.0f + 0.5f * e_minus_one), tanh};
}

template <Loss kLoss>
FASTKD_INLINE ClassTerm pointwise(vf s, vf t, float inverse) {
  static_assert(kLoss == Loss::kBinaryKL || kLoss == Loss::kBinaryKLNorm, "no pointwise loss");
  if (kLoss == Loss::kBinaryKL) return binary_kl(s * inverse, t * inverse);
  return log_cosh((s - t) * (0.5f * inverse));
}

// `logits(i, s, t)` gives the vectors of n logits, `take(i, slope)` gets each one's derivative; returns the sum.
template <Loss kLoss, class Logits, class Take>
FASTKD_INLINE double sum_pointwise(int n, float inverse, const Logits& logits, const Take& take) {
  double total = 0;
  for (int begin = 0; begin < n; begin += kFactors * kLanes) {
    const int end = n - begin < kFactors * kLanes ? n : begin + kFactors * kLanes;
    vf sum = {}, product = broadcast(1.0f);
    for (int i = begin; i < end; i += kLanes) {
      vf s, t;
      logits(i, s, t);
      const ClassTerm term = pointwise<kLoss>(s, t, inverse);
      sum += term.value;
      if (kLoss == Loss::kBinaryKLNorm) product *= term.factor;
      take(i, term.slope);
    }
    if (kLoss == Loss::kBinaryKLNorm) sum += natural_log(product);
    total += horizontal_sum(sum);
  }
  return total;
}

// Whole vectors of one dtype, from the row to the gradient without a stop; returns how many logits that were.
template <Loss kLoss, class E>
static int sweep_vectors(const RowJob& job, int64_t offset, int n, float inverse, float slope_weight, double& total) {
  const Rows& rows = *job.rows;
  const typename E::type* from_s = element_at<E>(rows.student, job.index, offset);
  const typename E::type* from_t = element_at<E>(rows.teacher, job.index, offset);
  const bool with_gradient = rows.gradient.data != nullptr;
  typename E::type* to = with_gradient ? element_at<E>(rows.gradient, job.index, offset) : nullptr;
  const Ahead next_s = ahead_of_block(rows.student, rows, job.index, offset);
  const Ahead next_t = ahead_of_block(rows.teacher, rows, job.index, offset);
  const Ahead next_gradient = ahead_of_block(rows.gradient, rows, job.index, offset);
  const vf masked = broadcast(kMasked);
  const int whole = n - n % kLanes;
  total += sum_pointwise<kLoss>(
      whole, inverse,
      [&](int i, vf& s, vf& t) __attribute__((always_inline)) {
        fetch(next_s, i);
        fetch(next_t, i);
        s = at_least(E::load(from_s + i), masked), t = at_least(E::load(from_t + i), masked);
      },
      [&](int i, vf slope) __attribute__((always_inline)) {
        if (!with_gradient) return;
        fetch_to_write(next_gradient, i);
        E::store(to + i, slope * slope_weight);
      });
  return whole;
}

template <Loss kLoss>
static int sweep_vectors(const RowJob& job, int64_t offset, int n, float inverse, float slope_weight, double& total) {
  if (job.rows->student.dtype != job.rows->teacher.dtype) return 0;
  return with_element(job.rows->student.dtype, [&](auto element) __attribute__((always_inline)) {
    return sweep_vectors<kLoss, decltype(element)>(job, offset, n, inverse, slope_weight, total);
  });
}

template <Loss kLoss>
static void sweep_pointwise(const RowJob& job, int64_t begin, int64_t end, RowPart& part) {
  const Rows& rows = *job.rows;
  const float temperature = job.options->values[0];
  const float weight = weight_of(rows, job.index), inverse = 1.0f / temperature;
  // d loss / d z: T^2 f'(u) / T for BinaryKL, T^2 f'(x) / 2T for BinaryKL-Norm.
  const float slope_weight = weight * temperature * (kLoss == Loss::kBinaryKL ? 1.0f : 0.5f);
  const bool with_gradient = rows.gradient.data != nullptr;
  float z_s[kBlock], z_t[kBlock];
  for (int64_t offset = begin; offset < end; offset += kBlock) {
    int n = block_size(end, offset);
    const int done = sweep_vectors<kLoss>(job, offset, n, inverse, slope_weight, part.student_sum);
    if (done == n) continue;
    // The row's last logits, or what has to be converted from two dtypes.
    n -= done;
    const int64_t rest = offset + done;
    const int padded = load_block(rows.student, job.index, rest, n, z_s);
    load_block(rows.teacher, job.index, rest, n, z_t);
    part.student_sum += sum_pointwise<kLoss>(
        padded, inverse,
        [&](int i, vf& s, vf& t) __attribute__((always_inline)) { s = load(z_s + i), t = load(z_t + i); },
        [&](int i, vf slope) __attribute__((always_inline)) { store(z_s + i, slope * slope_weight); });
    if (with_gradient)
      store_block(rows.gradient, job.index, rest, n,
                  [&](int i) __attribute__((always_inline)) { return load(z_s + i); });
  }
}

static void combine_pointwise(RowJob& job, const RowPart* parts, int count) {
  const double temperature = job.options->values[0];
  double total = 0;
  for (int i = 0; i < count; i++) total += parts[i].student_sum;
  write_loss(job, temperature * temperature * total);
}

template <Loss kLoss>
static const Phases& pointwise_phases() {
  static constexpr Phases phases = {1, {sweep_pointwise<kLoss>, nullptr, nullptr}, {combine_pointwise, nullptr, nullptr}};
  return phases;
}

// gradient[row] *= upstream[row], in place; a row whose factor is 1 is not touched.
static void scale_rows(const Matrix& gradient, const float* upstream, int64_t upstream_stride, int64_t classes,
                       int64_t begin, int64_t end) {
  float block[kBlock];
  for (int64_t row = begin; row < end; row++) {
    const float factor = upstream[row * upstream_stride];
    if (factor == 1.0f) continue;
    for (int64_t offset = 0; offset < classes; offset += kBlock) {
      const int n = block_size(classes, offset);
      load_block(gradient, row, offset, n, block, -__builtin_inff());
      store_block(gradient, row, offset, n,
                  [&](int i) __attribute__((always_inline)) { return load(block + i) * factor; });
    }
  }
}

}  // namespace FASTKD_ISA
}  // namespace fastkd

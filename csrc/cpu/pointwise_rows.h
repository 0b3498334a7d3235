// Losses that are a sum over classes of a function of two logits: one sweep, no row statistics.
#pragma once

#include "row_phases.h"
#include "vector.h"

namespace fastkd {
namespace FASTKD_ISA {

struct ValueAndSlope {
  vf value, slope;
};

// KL(Bern(sigmoid(v)) || Bern(sigmoid(u))) and its derivative in u, sigmoid(u) - sigmoid(v).
FASTKD_INLINE ValueAndSlope binary_kl(vf u, vf v) {
  const vf e_u = exp_or_zero(-absolute(u)), e_v = exp_or_zero(-absolute(v));
  const vf sigmoid_u = select(u > 0.0f, broadcast(1.0f), e_u) / (1.0f + e_u);
  const vf sigmoid_v = select(v > 0.0f, broadcast(1.0f), e_v) / (1.0f + e_v);
  // softplus(u) - softplus(v) = max(u, 0) - max(v, 0) + log((1 + e_u) / (1 + e_v)).
  const vf log_ratio = twice_atanh((e_u - e_v) / (2.0f + e_u + e_v));
  const vf hinges = select(u > 0.0f, u, vf{}) - select(v > 0.0f, v, vf{});
  return {sigmoid_v * (v - u) + (hinges + log_ratio), sigmoid_u - sigmoid_v};
}

// log cosh(x) and its derivative tanh(x).
FASTKD_INLINE ValueAndSlope log_cosh(vf x) {
  const vf magnitude = absolute(x);
  const PowerOfTwo e = power_of_two(at_least(magnitude * (-2.0f * kLog2E), broadcast(-126.0f)));
  const vf e_minus_one = e.scale * e.minus_one + (e.scale - 1.0f);  // E = e^{-2|x|} - 1, exact near 0
  // tanh|x| = -E / (2 + E) and log((1 + e^{-2|x|}) / 2) = 2 atanh(E / (4 + E)), with one division.
  const vf two = 2.0f + e_minus_one, four = 4.0f + e_minus_one;
  const vf ratio = e_minus_one / (two * four);
  const vf tanh_magnitude = -ratio * four;
  const vf tanh = select(x < 0.0f, -tanh_magnitude, tanh_magnitude);
  // The series where log cosh would cancel against |x|.
  const vf s = x * x;
  const vf series = s * (0.5f - s * (1.0f / 12 - s * (1.0f / 45 - s * (17.0f / 2520))));
  const vf value = magnitude + twice_atanh(ratio * two);
  return {select(magnitude < 0.2f, series, value), tanh};
}

template <Loss kLoss>
FASTKD_INLINE ValueAndSlope pointwise(vf s, vf t, float inverse) {
  if (kLoss == Loss::kBinaryKL) return binary_kl(s * inverse, t * inverse);
  return log_cosh((s - t) * (0.5f * inverse));
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
    const int n = block_size(end, offset);
    const int padded = load_block(rows.student, job.index, offset, n, z_s);
    load_block(rows.teacher, job.index, offset, n, z_t);
    vf sum = {};
    const Ahead next_s = ahead_of_block(rows.student, rows, job.index, offset);
    const Ahead next_t = ahead_of_block(rows.teacher, rows, job.index, offset);
    const Ahead gradient = ahead_at(rows.gradient, job.index, offset);
    for (int i = 0; i < padded; i += kLanes) {
      fetch(next_s, i);
      fetch(next_t, i);
      if (with_gradient) fetch_to_write(gradient, i);
      const ValueAndSlope at = pointwise<kLoss>(load(z_s + i), load(z_t + i), inverse);
      sum += at.value;
      store(z_s + i, at.slope * slope_weight);
    }
    part.student_sum += horizontal_sum(sum);
    if (with_gradient)
      store_block(rows.gradient, job.index, offset, n,
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

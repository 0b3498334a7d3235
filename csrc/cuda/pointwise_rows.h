// Losses that are a sum over classes of a function of two logits: one sweep, no row statistics. And the scaling of a
// gradient by what comes from upstream.
#pragma once

#include "row_ends.h"
#include "scalar_math.h"

namespace fastkd {
namespace cuda {

struct ValueAndSlope {
  float value, slope;
};

// KL(Bern(sigmoid(v)) || Bern(sigmoid(u))) and its derivative in u, sigmoid(u) - sigmoid(v).
FASTKD_DEVICE ValueAndSlope binary_kl(float u, float v) {
  const float e_u = power_of_two(-fabsf(u) * 1.44269504f), e_v = power_of_two(-fabsf(v) * 1.44269504f);
  const float sigmoid_u = quotient(u > 0 ? 1.0f : e_u, 1.0f + e_u), sigmoid_v = quotient(v > 0 ? 1.0f : e_v, 1.0f + e_v);
  // softplus(u) - softplus(v) = max(u, 0) - max(v, 0) + log((1 + e_u) / (1 + e_v)).
  const float log_ratio = twice_atanh(quotient(e_u - e_v, 2.0f + e_u + e_v));
  const float hinges = (u > 0 ? u : 0.0f) - (v > 0 ? v : 0.0f);
  return {fused(sigmoid_v, v - u, hinges + log_ratio), sigmoid_u - sigmoid_v};
}

// log cosh(x) and its derivative tanh(x).
FASTKD_DEVICE ValueAndSlope log_cosh(float x) {
  const float magnitude = fabsf(x), e_minus_one = exp_minus_one(-2.0f * magnitude);  // E = e^{-2|x|} - 1
  // tanh|x| = -E / (2 + E) and log((1 + e^{-2|x|}) / 2) = 2 atanh(E / (4 + E)), with one division.
  const float two = 2.0f + e_minus_one, four = 4.0f + e_minus_one, ratio = quotient(e_minus_one, two * four);
  const float tanh_magnitude = -ratio * four;
  // The series where log cosh would cancel against |x|.
  const float s = x * x;
  const float series = s * (0.5f - s * (1.0f / 12 - s * (1.0f / 45 - s * (17.0f / 2520))));
  return {magnitude < 0.2f ? series : magnitude + twice_atanh(ratio * two), x < 0 ? -tanh_magnitude : tanh_magnitude};
}

template <Loss kLoss>
FASTKD_KERNEL pointwise_rows(FASTKD_PARAMETER RowLossArguments arguments) {
  const Rows& rows = arguments.pairs[block_y()];
  Team team(arguments.plan);
  const int64_t index = team.row();
  const RowHead head = head_of(rows, index, false);
  const int classes = int(rows.classes);
  const Share share = share_of(team, arguments, rows, index, head.kind);
  const float temperature = options_of(arguments).values[0], inverse = 1.0f / temperature;
  // d loss / d z: T^2 f'(u) / T for BinaryKL, T^2 f'(x) / 2T for BinaryKL-Norm.
  const float slope_weight = head.weight * temperature * (kLoss == Loss::kBinaryKL ? 1.0f : 0.5f);
  const bool with_gradient = rows.gradient.data != nullptr;
  const RowPointer gradient = gradient_row(rows, index, share);
  float total[] = {0.0f};
  share.first_sweep([&](int column, float (&s)[kVector], float (&t)[kVector]) {
    float slopes[kVector], sum = 0;
#pragma unroll
    for (int i = 0; i < kVector; i++) {
      static_assert(kLoss == Loss::kBinaryKL || kLoss == Loss::kBinaryKLNorm, "no pointwise loss");
      const ValueAndSlope at = kLoss == Loss::kBinaryKL ? binary_kl(s[i] * inverse, t[i] * inverse)
                                                        : log_cosh((s[i] - t[i]) * (0.5f * inverse));
      sum += at.value;
      slopes[i] = at.slope * slope_weight;
    }
    total[0] += sum;
    if (with_gradient) store_vector(gradient, column, classes, slopes);
  });
  team.all(total, Sum());
  team.done_exchanging();
  if (head.kind != RowKind::kComputed) write_uncomputed(team, rows, index, head.kind);
  else write_losses(team, rows, index, head.weight * temperature * temperature * total[0], {});
  team.leave();
}

// gradient[row] *= upstream[row], in place; a row whose factor is 1 is not touched. The factor is read here, so that
// nobody waits for it. The blocks of a row have nothing to say to each other.
FASTKD_KERNEL scale_rows(FASTKD_PARAMETER ScaleArguments arguments) {
  const Team team(arguments.plan);
  const int64_t index = team.row();
  if (index >= arguments.count) return;
  const float factor = arguments.upstream[index * arguments.upstream_stride];
  if (factor == 1.0f) return;
  const int classes = int(arguments.classes);
  const Share share(team, arguments.plan, arguments.gradient, arguments.gradient, false, index, classes,
                    as_float(minus_infinity(DType::kFloat)));
  share.first_sweep([&](int column, float (&values)[kVector], float (&)[kVector]) {
    for (float& value : values) value *= factor;
    store_vector(share.student(), column, classes, values);
  });
}

}  // namespace cuda
}  // namespace fastkd

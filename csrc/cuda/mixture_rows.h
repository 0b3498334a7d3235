// Generalised Jensen-Shannon divergence: the mixture of the two distributions needs both normalised first, so the
// sums of the softmax family come before, and a sweep of its own before the gradient's.
#pragma once

#include "scalar_math.h"
#include "softmax_rows.h"

namespace fastkd {
namespace cuda {

// x log(x / m) of probabilities; 0 at x = 0. `above` is x - m, from which comes the logarithm where the two are close:
// their rounded ratio is 1 within more than all that the two differ by.
FASTKD_DEVICE float times_log_ratio(float x, float m, float above) {
  if (fabsf(above) < 0.25f * m) return x * twice_atanh(quotient(above, x + m));
  return x > 0 ? x * logf(x / m) : x * 0.0f;  // a NaN stays
}

struct MixtureValue {
  float q, q_log, p_log;  // q, q log(q / m) and p log(p / m)
};

FASTKD_DEVICE MixtureValue mixture_of(float q, float p, float beta) {
  // m from the difference: at p = q it is q exactly, and both logarithms are 0.
  const float difference = p - q;
  const float m = beta <= 0.5f ? fused(beta, difference, q) : fused(beta - 1.0f, difference, p);
  return {q, times_log_ratio(q, m, -beta * difference), times_log_ratio(p, m, (1.0f - beta) * difference)};
}

FASTKD_KERNEL jsd_rows(FASTKD_PARAMETER RowLossArguments arguments) {
  const Rows& rows = arguments.pairs[block_y()];
  Team team(arguments.plan);
  const int64_t index = team.row();
  const RowHead head = head_of(rows, index, false);
  const int classes = int(rows.classes);
  const Share share = share_of(team, arguments, rows, index, head.kind);
  Row<float> row{};
  row.classes = rows.classes;
  const LossOptions options = options_of(arguments);
  slopes_of(options, row.student.slope, row.teacher.slope);
  sum_share<0>([&](const auto& visit) { share.first_sweep(visit); }, -1, false, row);
  combine_statistics<0>(team, row);

  const float power = row.student.slope * kLog2E, beta = options.values[1];
  const float max_s = row.sums.max_s, max_t = row.sums.max_t;
  const float scale_s = 1.0f / row.sums.sum_s, scale_t = 1.0f / row.sums.sum_t;
  const auto mixture = [&](float s, float t) {
    return mixture_of(power_of_two((s - max_s) * power) * scale_s, power_of_two((t - max_t) * power) * scale_t, beta);
  };
  float divergences[] = {0.0f, 0.0f};
  share.next_sweep([&](int, float (&s)[kVector], float (&t)[kVector]) {
    float of_student = 0, of_teacher = 0;  // signed terms: summed a vector at a time, they lose less
    for (int i = 0; i < kVector; i++) {
      const MixtureValue value = mixture(s[i], t[i]);
      of_student += value.q_log;
      of_teacher += value.p_log;
    }
    divergences[0] += of_student;
    divergences[1] += of_teacher;
  });
  team.all(divergences, Sum());
  team.done_exchanging();

  if (head.kind != RowKind::kComputed) {
    write_uncomputed(team, rows, index, head.kind);
  } else {
    // A NaN of either model makes the gradient NaN.
    const float student_kl = divergences[0] + 0.0f * divergences[1], weight = head.weight;
    write_losses(team, rows, index, weight * (beta * divergences[1] + (1.0f - beta) * student_kl), {});
    if (rows.gradient.data != nullptr) {
      const RowPointer gradient = gradient_row(rows, index, share);
      const float scale = weight * (1.0f - beta) * row.student.slope;
      share.next_sweep([&](int column, float (&s)[kVector], float (&t)[kVector]) {
        float values[kVector];
        for (int i = 0; i < kVector; i++) {
          const MixtureValue value = mixture(s[i], t[i]);
          values[i] = scale * fused(value.q, -student_kl, value.q_log);
        }
        store_vector(gradient, column, classes, values);
      });
    }
  }
  team.leave();
}

}  // namespace cuda
}  // namespace fastkd

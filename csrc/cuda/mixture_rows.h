// The row skeleton of the mixture family: sums over classes of a function of q and p. q and p need the normalising
// sums, so there are three passes: softmax sums, loss, gradient.
#pragma once

#include "softmax_rows.h"

namespace fastkd {
namespace cuda {

template <class Loss, class Type>
FASTKD_KERNEL(kRegisters<Type>)
mixture_rows(FASTKD_PARAMETER RowLossArguments arguments) {
  const Rows& rows = arguments.pairs[block_y()];
  Team team(arguments.plan);
  const int64_t index = team.row();
  const RowInfo info = row_info(rows, index, false);
  const int classes = int(rows.classes);
  const Share<Type> share = share_of<Type>(team, arguments, rows, index, info.kind);
  Row<float> row{};
  row.classes = rows.classes;
  const LossOptions options = options_of(arguments);
  slopes_of(options, row.student.slope, row.teacher.slope);
  Difference unused{};
  sum_share<kSumsOnly | kDistills, Type>([&](const auto& visit) { share.first_pass(visit); }, -1, false, row, unused);
  combine_statistics<kSumsOnly | kDistills>(team, row, unused);

  const typename Loss::Options values = options_as<Loss>(options);
  const float power = row.student.slope * kLog2E, max_s = row.sums.max_s, max_t = row.sums.max_t;
  const float scale_s = 1.0f / row.sums.sum_s, scale_t = 1.0f / row.sums.sum_t;
  const auto q_of = [&](float s) { return power_of_two((s - max_s) * power) * scale_s; };
  const auto p_of = [&](float t) { return power_of_two((t - max_t) * power) * scale_t; };
  float totals[] = {0.0f, 0.0f, 0.0f, 0.0f};  // of the loss, q h, and the q at the first and at the second origin
  share.next_pass([&](int column, Vector<Type>& s, Vector<Type>& t) {
    exclude_outside(column, classes, kMasked, s, t);
    float value = 0, slope = 0, first = 0, second = 0;  // per vector: fewer roundings of the signed terms
    for (int i = 0; i < kVector; i++) {
      const float q = q_of(s.z[i]), p = p_of(t.z[i]);
      const MixtureTerm<float> term = Loss::template formula<ScalarMath>(values, q, p, p - q);
      value += term.value;
      slope += term.weighted_slope;
      first += q - term.shifted;
      second += term.shifted;
    }
    totals[0] += value;
    totals[1] += slope;
    totals[2] += first;
    totals[3] += second;
  });
  team.all_reduce(totals, Sum());
  team.arrive_before_exit();

  if (info.kind != RowKind::kComputed) {
    write_uncomputed<Type>(team, rows, index, info.kind);
  } else {
    write_losses(team, rows, index, info.weight * totals[0], {});
    if (rows.gradient.data != nullptr) {
      const RowPointer<Type> gradient = gradient_row(rows, index, share);
      // The means of h relative to the two origins are these sums divided by the sum of the computed q, rather than by 1:
      // their common rounding error cancels in h - mean. 0 * totals[0] propagates a NaN of the teacher.
      const float q_sum = totals[2] + totals[3], step = Loss::origin_step(values);
      const float slope_sum = totals[1] + step * totals[3], shifted_sum = totals[1] - step * totals[2];
      const float scale = info.weight * row.student.slope / (q_sum + 0.0f * totals[0]);
      share.next_pass([&](int column, const Vector<Type>& s, const Vector<Type>& t) {
        float gradients[kVector];
        for (int i = 0; i < kVector; i++) {
          const float q = q_of(s.z[i]), p = p_of(t.z[i]);
          const MixtureTerm<float> term = Loss::template formula<ScalarMath>(values, q, p, p - q);
          const float sum = term.shifted > 0.0f ? shifted_sum : slope_sum;
          gradients[i] = scale * (term.weighted_slope * q_sum - q * sum);  // equal products cancel: not fused
        }
        store_vector(gradient, column, classes, gradients);
      });
    }
  }
  team.wait_before_exit();
}

}  // namespace cuda
}  // namespace fastkd

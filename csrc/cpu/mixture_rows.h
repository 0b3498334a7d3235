// Generalised Jensen-Shannon divergence: the mixture of the two distributions needs both normalised first, so the
// sums of the softmax family come before, and a sweep of its own before the gradient's.
#pragma once

#include "softmax_rows.h"

namespace fastkd {
namespace FASTKD_ISA {

// x log(x / m) for probabilities x <= m / weight; 0 at x = 0.
FASTKD_INLINE vf times_log_ratio(vf x, vf m) {
  const vf safe = select(x > 0.0f, m, broadcast(1.0f));
  const vf ratio = select(x > 0.0f, x, broadcast(1.0f)) / safe;
  return x * natural_log(ratio);
}

static void jsd_row(const Rows& rows, const LossOptions& options, int64_t index) {
  const double temperature = options.values[0], beta = options.values[1];
  Row<double> row{};
  row.classes = rows.classes;
  slopes_of(options, row.student.slope, row.teacher.slope);
  const Kept kept = keep(rows.classes, false);
  sweep_statistics<0>(rows, index, -1, row, kept);

  // q and q log(q / m) take the places of the exponentials.
  double student_kl = 0, teacher_kl = 0;
  const vf weight_p = broadcast(float(beta)), weight_q = broadcast(float(1 - beta));
  for (int64_t offset = 0, block = 0; offset < row.classes; offset += kBlock, block++) {
    const int padded = (block_size(row.classes, offset) + kLanes - 1) / kLanes * kLanes;
    const double below_s = double(kept.max_s[block]) - row.sums.max_s;
    const double below_t = double(kept.max_t[block]) - row.sums.max_t;
    const vf a = broadcast(float(__builtin_exp(below_s * row.student.slope) / row.sums.sum_s));
    const vf b = broadcast(float(__builtin_exp(below_t * row.teacher.slope) / row.sums.sum_t));
    vf sum_q = {}, sum_p = {};
    for (int i = 0; i < padded; i += kLanes) {
      float *at_s = kept.student + offset + i, *at_t = kept.teacher + offset + i;
      const vf q = a * load(at_s), p = b * load(at_t);
      // m from the difference: at p = q it is q exactly, and both logarithms are 0.
      const vf difference = rounded(p) - rounded(q);
      const vf m = beta <= 0.5 ? q + weight_p * difference : p - weight_q * difference;
      const vf q_log = times_log_ratio(q, m);
      sum_q += q_log;
      sum_p += times_log_ratio(p, m);
      store(at_s, q);
      store(at_t, q_log);
    }
    student_kl += horizontal_sum(sum_q);
    teacher_kl += horizontal_sum(sum_p);
  }
  const double weight = weight_of(rows, index);
  rows.losses[index] = float(weight * (beta * teacher_kl + (1 - beta) * student_kl));
  if (rows.gradient.data == nullptr) return;

  const vf scale = broadcast(float(weight * (1 - beta) / temperature)), mean = broadcast(float(student_kl));
  for (int64_t offset = 0; offset < row.classes; offset += kBlock) {
    const float *q = kept.student + offset, *q_log = kept.teacher + offset;
    store_block(rows.gradient, index, offset, block_size(row.classes, offset),
                [&](int i) __attribute__((always_inline)) { return scale * (load(q_log + i) - load(q + i) * mean); });
  }
}

}  // namespace FASTKD_ISA
}  // namespace fastkd

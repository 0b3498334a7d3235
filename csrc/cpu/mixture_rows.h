// Generalised Jensen-Shannon divergence: the mixture of the two distributions needs both normalised first, so the
// sums of the softmax family come before, and a sweep of its own before the gradient's.
#pragma once

#include "softmax_rows.h"

namespace fastkd {
namespace FASTKD_ISA {

// x log(x / m) for probabilities x <= m / weight; 0 at x = 0. `above` is x - m, from which comes the logarithm where the
// two are close: their rounded ratio is 1 within more than all that the two differ by.
FASTKD_INLINE vf times_log_ratio(vf x, vf m, vf above) {
  const vf one = broadcast(1.0f);
  const vf ratio = select(x > 0.0f, x, one) / select(x > 0.0f, m, one);
  const Halves ratio_halves = halves_of(ratio);
  const vi close = absolute(above) < 0.25f * m;
  const vf numerator = select(close, above, ratio_halves.fraction - 1.0f);
  const vf denominator = select(close, x + m, ratio_halves.fraction + 1.0f);
  return x * (twice_atanh(numerator / denominator) + select(close, vf{}, ratio_halves.exponent * 0.693147181f));
}

struct MixtureSums {
  double student_kl, teacher_kl;
};

// Of a block, from its exponentials times `factor`: q to `to_q`, q log(q / m) to `to_q_log`, and the two KLs' sums.
FASTKD_INLINE MixtureSums mix_block(const float* exp_u, const float* exp_v, double factor_s, double factor_t,
                                    double beta, int padded, float* to_q, float* to_q_log) {
  const vf weight_p = broadcast(float(beta)), weight_q = broadcast(float(1 - beta));
  const vf a = broadcast(float(factor_s)), b = broadcast(float(factor_t));
  vf sum_q = {}, sum_p = {};
  for (int i = 0; i < padded; i += kLanes) {
    const vf q = a * load(exp_u + i), p = b * load(exp_v + i);
    // m from the difference: at p = q it is q exactly, and both logarithms are 0.
    const vf difference = rounded(p) - rounded(q);
    const vf m = beta <= 0.5 ? q + weight_p * difference : p - weight_q * difference;
    const vf q_log = times_log_ratio(q, m, weight_p * -difference);
    sum_q += q_log;
    sum_p += times_log_ratio(p, m, weight_q * difference);
    store(to_q + i, q);
    store(to_q_log + i, q_log);
  }
  return {horizontal_sum(sum_q), horizontal_sum(sum_p)};
}

// The block at `offset` of a row whose exponentials were kept (q and q log(q / m) take their places) or are computed
// again, into `q` and `q_log`.
FASTKD_INLINE MixtureSums mix_again(const RowJob& job, int64_t offset, int n, float* q, float* q_log) {
  float z_s[kBlock], z_t[kBlock];
  const SoftmaxStatistics<double>& sums = job.row.sums;
  const int padded = load_block(job.rows->student, job.index, offset, n, z_s);
  load_block(job.rows->teacher, job.index, offset, n, z_t);
  const Exponents exponents = exponents_of(job.row, sums.max_s, sums.max_t);
  for (int i = 0; i < padded; i += kLanes) {
    store(z_s + i, student_exponential(exponents, load(z_s + i)));
    store(z_t + i, teacher_exponential(exponents, load(z_t + i)));
  }
  return mix_block(z_s, z_t, 1 / sums.sum_s, 1 / sums.sum_t, job.options->values[1], padded, q, q_log);
}

static void sweep_mixture(const RowJob& job, int64_t begin, int64_t end, RowPart& part) {
  float q[kBlock], q_log[kBlock];
  const SoftmaxStatistics<double>& sums = job.row.sums;
  const Kept& kept = job.kept;
  for (int64_t offset = begin; offset < end; offset += kBlock) {
    const int n = block_size(end, offset);
    MixtureSums of_block;
    if (kept.student != nullptr) {
      const Exponentials exponentials = kept_block(kept, offset, n);
      const double below_s = double(kept.max_s[offset / kBlock]) - sums.max_s;
      const double below_t = double(kept.max_t[offset / kBlock]) - sums.max_t;
      of_block = mix_block(exponentials.student, exponentials.teacher,
                           __builtin_exp(below_s * job.row.student.slope) / sums.sum_s,
                           __builtin_exp(below_t * job.row.teacher.slope) / sums.sum_t, job.options->values[1],
                           padded_to_line(n), exponentials.student, exponentials.teacher);
    } else {
      of_block = mix_again(job, offset, n, q, q_log);
    }
    part.student_sum += of_block.student_kl;
    part.teacher_sum += of_block.teacher_kl;
  }
}

static void combine_mixture(RowJob& job, const RowPart* parts, int count) {
  double teacher_kl = 0;
  job.student_kl = 0;
  for (int i = 0; i < count; i++) job.student_kl += parts[i].student_sum, teacher_kl += parts[i].teacher_sum;
  job.student_kl += 0 * teacher_kl;  // a NaN of either makes the gradient NaN
  const double beta = job.options->values[1];
  write_loss(job, beta * teacher_kl + (1 - beta) * job.student_kl);
}

static void sweep_mixture_gradient(const RowJob& job, int64_t begin, int64_t end, RowPart&) {
  float again_q[kBlock], again_q_log[kBlock];
  const double temperature = job.options->values[0], beta = job.options->values[1];
  const vf scale = broadcast(float(weight_of(*job.rows, job.index) * (1 - beta) / temperature));
  const vf mean = broadcast(float(job.student_kl));
  for (int64_t offset = begin; offset < end; offset += kBlock) {
    const int n = block_size(end, offset);
    const float *q = again_q, *q_log = again_q_log;
    if (job.kept.student != nullptr) {
      const Exponentials mixed = kept_block(job.kept, offset, n);
      q = mixed.student, q_log = mixed.teacher;
    } else {
      mix_again(job, offset, n, again_q, again_q_log);
    }
    store_block(job.rows->gradient, job.index, offset, n,
                [&](int i) __attribute__((always_inline)) { return scale * (load(q_log + i) - load(q + i) * mean); });
  }
}

constexpr Phases kMixturePhases = {3,
                                   {sweep_statistics<0>, sweep_mixture, sweep_mixture_gradient},
                                   {combine_sums<0>, combine_mixture, nothing_to_combine}};

}  // namespace FASTKD_ISA
}  // namespace fastkd

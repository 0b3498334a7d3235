// The row skeleton of the mixture family: sums over classes of a function of q and p. q and p need the normalising
// sums, so there are three passes: softmax sums, loss, gradient.
#pragma once

#include "softmax_rows.h"

namespace fastkd {
namespace FASTKD_ISA {

struct MixtureSums {
  double value, slope, q_first, q_second;
};

// Writes q and q h of a block, from its exponentials times the factors; returns the sums of loss, of q h, and of the q at
// the first and at the second origin, whose sign is set where it is written.
template <class Loss>
FASTKD_INLINE MixtureSums mix_block(const typename Loss::Options& options, const float* exp_u, const float* exp_v,
                                    double factor_s, double factor_t, int padded, float* to_q, float* to_slope) {
  const vf a = broadcast(float(factor_s)), b = broadcast(float(factor_t));
  vf value = {}, slope = {}, first = {}, second = {};
  for (int part = 0; part < padded; part += kPart) {
    vf part_value = {}, part_slope = {}, part_first = {}, part_second = {};
    for (int i = part; i < end_of_part(part, padded); i += kLanes) {
      const vf q = a * load(exp_u + i), p = b * load(exp_v + i);
      const MixtureTerm<vf> term = Loss::template formula<VectorMath>(options, q, p, rounded(p) - rounded(q));
      part_value += term.value;
      part_slope += term.weighted_slope;
      part_first += Loss::kTwoOrigins ? q - term.shifted : q;
      if (Loss::kTwoOrigins) part_second += term.shifted;
      store(to_q + i, Loss::kTwoOrigins ? q - 2.0f * term.shifted : q);
      store(to_slope + i, term.weighted_slope);
    }
    value += part_value, slope += part_slope, first += part_first, second += part_second;
  }
  return {horizontal_sum(value), horizontal_sum(slope), horizontal_sum(first), horizontal_sum(second)};
}

// The same from the logits, for a row whose exponentials are not cached.
template <class Loss>
FASTKD_INLINE MixtureSums recompute_block(const RowJob& job, int64_t offset, int n, float* q, float* slope) {
  float z_s[kBlock], z_t[kBlock];
  const SoftmaxStatistics<double>& sums = job.row.sums;
  const int padded = load_block(job.rows->student, job.index, offset, n, z_s);
  load_block(job.rows->teacher, job.index, offset, n, z_t);
  const Exponents exponents = exponents_of(job.row, sums.max_s, sums.max_t);
  for (int i = 0; i < padded; i += kLanes) {
    store(z_s + i, student_exponential(exponents, load(z_s + i)));
    store(z_t + i, teacher_exponential(exponents, load(z_t + i)));
  }
  return mix_block<Loss>(options_as<Loss>(*job.options), z_s, z_t, 1 / sums.sum_s, 1 / sums.sum_t, padded, q, slope);
}

template <class Loss>
static void mixture_pass(const RowJob& job, int64_t begin, int64_t end, RowPart& part) {
  float q[kBlock], slope[kBlock];
  const SoftmaxStatistics<double>& sums = job.row.sums;
  const Cached& cached = job.cached;
  for (int64_t offset = begin; offset < end; offset += kBlock) {
    const int n = block_size(end, offset);
    MixtureSums of_block;
    if (cached.student != nullptr) {
      // In place: q and q h overwrite the exponentials.
      const Exponentials exponentials = cached_block(cached, offset, n);
      const double below_s = double(cached.max_s[offset / kBlock]) - sums.max_s;
      const double below_t = double(cached.max_t[offset / kBlock]) - sums.max_t;
      of_block = mix_block<Loss>(options_as<Loss>(*job.options), exponentials.student, exponentials.teacher,
                                 __builtin_exp(below_s * job.row.student.slope) / sums.sum_s,
                                 __builtin_exp(below_t * job.row.teacher.slope) / sums.sum_t, padded_to_line(n),
                                 exponentials.student, exponentials.teacher);
    } else {
      of_block = recompute_block<Loss>(job, offset, n, q, slope);
    }
    part.value_sum += of_block.value;
    part.slope_sum += of_block.slope;
    part.q_first += of_block.q_first;
    part.q_second += of_block.q_second;
  }
}

template <class Loss>
static void combine_mixture(RowJob& job, const RowPart* parts, int count) {
  double value = 0, slope = 0, first = 0, second = 0;
  for (int i = 0; i < count; i++) {
    value += parts[i].value_sum, slope += parts[i].slope_sum;
    first += parts[i].q_first, second += parts[i].q_second;
  }
  // Divided by the sum of these q rather than by 1: their common rounding error cancels in q (h - mean). 0 * value
  // propagates a NaN of the teacher to the gradient.
  const double step = Loss::origin_step(options_as<Loss>(*job.options));
  job.mean_slope = (slope + step * second) / (first + second) + 0 * value;
  job.shifted_mean = (slope - step * first) / (first + second) + 0 * value;
  write_loss(job, value);
}

template <class Loss>
static void mixture_gradient_pass(const RowJob& job, int64_t begin, int64_t end, RowPart&) {
  float recomputed_q[kBlock], recomputed_slope[kBlock];
  const vf scale = broadcast(float(weight_of(*job.rows, job.index) * job.row.student.slope));
  const vf mean = broadcast(float(job.mean_slope)), shifted_mean = broadcast(float(job.shifted_mean));
  for (int64_t offset = begin; offset < end; offset += kBlock) {
    const int n = block_size(end, offset);
    const float *q = recomputed_q, *slope = recomputed_slope;
    if (job.cached.student != nullptr) {
      const Exponentials mixed = cached_block(job.cached, offset, n);
      q = mixed.student, slope = mixed.teacher;
    } else {
      recompute_block<Loss>(job, offset, n, recomputed_q, recomputed_slope);
    }
    store_block(job.rows->gradient, job.index, offset, n, [&](int i) __attribute__((always_inline)) {
      const vf weight = load(q + i);
      if (!Loss::kTwoOrigins) return scale * (load(slope + i) - weight * mean);
      return scale * (load(slope + i) - absolute(weight) * select(weight < 0.0f, shifted_mean, mean));
    });
  }
}

template <class Loss>
static const Phases* phases_for(unsigned, MixtureFamily) {
  static constexpr Phases phases = {3,
                                    true,
                                    {statistics_pass<kSumsOnly>, mixture_pass<Loss>, mixture_gradient_pass<Loss>},
                                    {combine_sums<kSumsOnly>, combine_mixture<Loss>, nothing_to_combine}};
  return &phases;
}

}  // namespace FASTKD_ISA
}  // namespace fastkd

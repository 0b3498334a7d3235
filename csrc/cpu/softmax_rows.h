// The row skeleton of the softmax family: a pass for the statistics, the row formula, a pass for the gradient.
//
// The first pass reads the logits block by block and caches their exponentials, relative to the largest logit so far or
// one not far below. The second forms the gradient from these, without reading the logits again.
#pragma once

#include "blocks.h"
#include "moments.h"
#include "row_phases.h"

namespace fastkd {
namespace FASTKD_ISA {

// ---- statistics ------------------------------------------------------------------------------------------------

// Parameters of the exponentials of a row's logits, relative to the bases.
struct Exponents {
  vf base_s, base_t;
  Exponent student, teacher;
};

FASTKD_INLINE Exponents exponents_of(const Row<double>& row, float max_s, float max_t) {
  return {broadcast(max_s), broadcast(max_t), exponent_of(row.student.slope), exponent_of(row.teacher.slope)};
}

FASTKD_INLINE vf student_exponential(const Exponents& e, vf s) { return exp_or_zero(s - e.base_s, e.student); }
FASTKD_INLINE vf teacher_exponential(const Exponents& e, vf t) { return exp_or_zero(t - e.base_t, e.teacher); }

// Excludes the label from a block; `top` becomes the maximum of the other classes.
FASTKD_INLINE void exclude_label(float* z_s, float* z_t, int64_t at, int padded, float excluded, RowLabel& label,
                                 vf& top_s, vf& top_t) {
  label = {true, z_s[at], z_t[at]};
  z_s[at] = z_t[at] = excluded;
  for (int i = 0; i < padded; i += kLanes) {
    top_s = at_least(load(z_s + i), top_s);
    top_t = at_least(load(z_t + i), top_t);
  }
}

// The sums of a block; those that kNeeds does not include are 0.
struct BlockSums {
  vf sum_s, sum_t, dot_s, dot_t, cross_t, moment_s, moment_t, t1_s, t1_t;
};

FASTKD_INLINE void move_sums(BlockSums& from, BlockSums& to) {
  to.sum_s += from.sum_s, to.sum_t += from.sum_t, to.dot_s += from.dot_s, to.dot_t += from.dot_t;
  to.cross_t += from.cross_t, to.moment_s += from.moment_s, to.moment_t += from.moment_t;
  to.t1_s += from.t1_s, to.t1_t += from.t1_t;
  from = BlockSums{};
}

// Pointers to the exponentials of a block.
struct Exponentials {
  float *student, *teacher, *t1;
};

// The block of n classes at `offset`.
FASTKD_INLINE Exponentials cached_block(const Cached& cached, int64_t offset, int n) {
  return {n == kBlock ? cached.student + offset : cached.last_student, cached.teacher + offset, cached.t1 + offset};
}

// `logits(i, s, t)` loads vectors of the block; the exponentials are written to `to`.
template <unsigned kNeeds, class Logits>
FASTKD_INLINE BlockSums sum_block(const RowJob& job, int64_t offset, int padded, const Exponents& exponents,
                                  const Exponentials to, const Logits& logits) {
  const Rows& rows = *job.rows;
  const Row<double>& row = job.row;
  const vf mean_s = broadcast(float(row.student.mean));
  const vf slope_s = broadcast(float(row.student.slope)), slope_t = broadcast(float(row.teacher.slope));
  const Prefetch next_s = prefetch_next_block(rows.student, rows, job.index, offset);
  const Prefetch next_t = prefetch_next_block(rows.teacher, rows, job.index, offset);
  const Prefetch gradient = prefetch_at(rows.gradient, job.index, offset);
  const bool with_gradient = rows.gradient.data != nullptr;
  const vf base_s = exponents.base_s, base_t = exponents.base_t;
  const Exponent exponent_s = exponents.student, exponent_t = kNeeds & kOwnSlopes ? exponents.teacher : exponent_s;
  BlockSums sums = {}, of_part = {};
  const auto add = [&](int i) __attribute__((always_inline)) {
    vf s, t;
    logits(i, s, t);
    // The differences are formed from the same rounded values as the exponentials: rounding then acts on the divergence
    // only like a perturbation of the logits.
    const vf x_s = s - base_s, x_t = t - base_t;
    const vf exp_u = exp_or_zero(x_s, exponent_s), exp_v = exp_or_zero(x_t, exponent_t);
    of_part.sum_s += exp_u;
    of_part.sum_t += exp_v;
    if (kNeeds & kCrossTerm) {
      of_part.cross_t += exp_v * x_s;
    } else if (!(kNeeds & kSumsOnly)) {
      // Exactly 0 for equal logits, finite for masked ones. A common slope is applied to the sum.
      const vf difference = kNeeds & kOwnSlopes ? rounded(x_t * slope_t) - rounded(x_s * slope_s) : x_t - x_s;
      if (kNeeds & kLogRatio) of_part.dot_s += exp_u * difference;
      else of_part.dot_t += exp_v * difference;
    }
    if (kNeeds & kStandardized) {
      const vf above_mean = s - mean_s;
      of_part.moment_s += exp_u * above_mean;
      of_part.moment_t += exp_v * above_mean;
    }
    if (kNeeds & kTeacherAtT1) of_part.t1_t += exp_or_zero(x_t);
    store(to.student + i, exp_u);
    store(to.teacher + i, exp_v);
    if (kNeeds & kStudentAtT1) {
      const vf exp_z = exp_or_zero(x_s);
      of_part.t1_s += exp_z;
      store(to.t1 + i, exp_z);
    }
  };
  for (int part = 0; part < padded; part += kPart) {
    for (int line = part; line < end_of_part(part, padded); line += kLine) {
      prefetch(next_s, line);
      prefetch(next_t, line);
      if (with_gradient) prefetch_for_write(gradient, line);
      for (int i = line; i < line + kLine; i += kLanes) add(i);
    }
    move_sums(of_part, sums);
  }
  return sums;
}

FASTKD_INLINE void add_block(const BlockSums& sums, SoftmaxStatistics<double>& total) {
  total.sum_s += horizontal_sum(sums.sum_s);
  total.sum_t += horizontal_sum(sums.sum_t);
  total.dot_s += horizontal_sum(sums.dot_s);
  total.dot_t += horizontal_sum(sums.dot_t);
  total.cross_t += horizontal_sum(sums.cross_t);
  total.moment_s += horizontal_sum(sums.moment_s);
  total.moment_t += horizontal_sum(sums.moment_t);
  total.t1_s += horizontal_sum(sums.t1_s);
  total.t1_t += horizontal_sum(sums.t1_t);
}

FASTKD_INLINE bool all_finite(const BlockSums& b) {
  const vf all = b.sum_s + b.sum_t + b.dot_s + b.dot_t + b.moment_s + b.moment_t + b.cross_t + b.t1_s + b.t1_t;
  return horizontal_sum(all - all) == 0;
}

// The outcome of processing a block in a single pass: its logits are converted, compared and summed relative to the
// bases so far, without a first pass for their maximum. Unless kDone, the block is processed again in two passes.
enum class SinglePass { kDone, kAboveBase, kNotFinite };

// Not inlined: with both versions of the loop in one function, the compiler spilled the sums to the stack.
template <unsigned kNeeds, class E>
static __attribute__((noinline)) SinglePass sum_single_pass(const RowJob& job, int64_t offset, const Exponentials& to,
                                                            SoftmaxStatistics<double>& total) {
  const Row<double>& row = job.row;
  const typename E::type* from_s = element_at<E>(job.rows->student, job.index, offset);
  const typename E::type* from_t = element_at<E>(job.rows->teacher, job.index, offset);
  if (total.sum_s == 0) {  // first block: the first few logits are likely close to the row's maximum
    const float first_s = horizontal_max(at_least(E::load(from_s), broadcast(kMasked)));
    const float first_t = horizontal_max(at_least(E::load(from_t), broadcast(kMasked)));
    if (!(first_s > kMasked && first_t > kMasked)) return SinglePass::kAboveBase;  // all masked, or a NaN
    total.max_s = first_s, total.max_t = first_t;
  } else if (!(total.max_s > kMasked && total.max_t > kMasked)) {
    return SinglePass::kAboveBase;  // -inf, which is not clamped here, would not equal the base
  }
  const Exponents exponents = exponents_of(row, total.max_s, total.max_t);
  vf top_s = exponents.base_s, top_t = exponents.base_t;
  const BlockSums sums =
      sum_block<kNeeds>(job, offset, kBlock, exponents, to, [&](int i, vf& s, vf& t) __attribute__((always_inline)) {
        s = E::load(from_s + i), t = E::load(from_t + i);
        top_s = at_least(s, top_s), top_t = at_least(t, top_t);
      });
  const float headroom_s = headroom(kNeeds & kStudentAtT1, float(row.student.slope));
  const float headroom_t = headroom(kNeeds & kTeacherAtT1, float(row.teacher.slope));
  if (horizontal_max(top_s) > total.max_s + headroom_s || horizontal_max(top_t) > total.max_t + headroom_t)
    return SinglePass::kAboveBase;
  if (!all_finite(sums)) return SinglePass::kNotFinite;
  add_block(sums, total);
  return SinglePass::kDone;
}

template <unsigned kNeeds>
static SinglePass sum_single_pass(const RowJob& job, int64_t offset, const Exponentials& to,
                                  SoftmaxStatistics<double>& total) {
  return with_element(job.rows->student.dtype, [&](auto element) __attribute__((always_inline)) {
    return sum_single_pass<kNeeds, decltype(element)>(job, offset, to, total);
  });
}

template <unsigned kNeeds>
static void statistics_pass(const RowJob& job, int64_t begin, int64_t end, RowPart& part) {
  float z_s[kBlock], z_t[kBlock], uncached[3][kBlock];
  const Rows& rows = *job.rows;
  const Row<double>& row = job.row;
  const Cached& cached = job.cached;
  SoftmaxStatistics<double>& total = part.sums;
  const bool has_cache = cached.student != nullptr;
  const bool label_smoothing = (job.options->needs & kLabelSmoothing) != 0;
  bool single_pass = rows.teacher.dtype == rows.student.dtype && !label_smoothing;
  const float masked = kNeeds & kOwnSlopes ? masked_value(row) : kMasked;
  total.max_s = total.max_t = kMasked;

  for (int64_t offset = begin; offset < end; offset += kBlock) {
    const int n = block_size(end, offset);
    const int64_t label_at = job.label_class - offset;
    const bool has_label = job.label_class >= 0 && label_at >= 0 && label_at < n;
    const Exponentials to =
        has_cache ? cached_block(cached, offset, n) : Exponentials{uncached[0], uncached[1], uncached[2]};
    SinglePass outcome = SinglePass::kAboveBase;
    if (single_pass && n == kBlock && !has_label) outcome = sum_single_pass<kNeeds>(job, offset, to, total);
    single_pass = single_pass && outcome != SinglePass::kNotFinite;  // masked classes: likely in the next blocks too
    if (outcome != SinglePass::kDone) {
      const vf top_before_s = broadcast(total.max_s), top_before_t = broadcast(total.max_t);
      vf top_s = top_before_s, top_t = top_before_t;
      const int padded = load_block(rows.student, job.index, offset, n, z_s, masked, top_s);
      load_block(rows.teacher, job.index, offset, n, z_t, masked, top_t);
      if (label_smoothing) total.logit_sum += sum_of_block(z_s, n, row.origin);
      if (has_label) {
        top_s = top_before_s, top_t = top_before_t;
        exclude_label(z_s, z_t, label_at, padded, excluded_below(masked), part.label, top_s, top_t);
      }
      rebase<kNeeds>(total, horizontal_max(top_s), horizontal_max(top_t), row.student.slope, row.teacher.slope);
      const Exponents exponents = exponents_of(row, total.max_s, total.max_t);
      const BlockSums sums = sum_block<kNeeds>(job, offset, padded, exponents, to,
                                               [&](int i, vf& s, vf& t) __attribute__((always_inline)) {
                                                 s = load(z_s + i), t = load(z_t + i);
                                               });
      add_block(sums, total);
    }
    if (has_cache) cached.max_s[offset / kBlock] = total.max_s, cached.max_t[offset / kBlock] = total.max_t;
  }
}

// The statistics of the whole row, and its label's logits.
template <unsigned kNeeds>
static void combine_sums(RowJob& job, const RowPart* parts, int count) {
  SoftmaxStatistics<double>& total = job.row.sums;
  total = parts[0].sums;
  job.row.label = parts[0].label;
  for (int i = 1; i < count; i++) {
    SoftmaxStatistics<double> part = parts[i].sums;
    const float max_s = part.max_s > total.max_s ? part.max_s : total.max_s;
    const float max_t = part.max_t > total.max_t ? part.max_t : total.max_t;
    rebase<kNeeds>(total, max_s, max_t, job.row.student.slope, job.row.teacher.slope);
    rebase<kNeeds>(part, max_s, max_t, job.row.student.slope, job.row.teacher.slope);
    add_sums(total, part);
    if (parts[i].label.present) job.row.label = parts[i].label;
  }
  if (!(kNeeds & kOwnSlopes)) total.dot_s *= job.row.teacher.slope, total.dot_t *= job.row.teacher.slope;
  total.cross_t *= job.row.student.slope;
}

template <class Loss, unsigned kNeeds>
static void combine_statistics(RowJob& job, const RowPart* parts, int count) {
  combine_sums<kNeeds>(job, parts, count);
  if (!(kNeeds & kStudentAtT1)) job.row.sums.t1_s = job.row.sums.sum_s;  // T is 1 if the formula reads it
  if (!(kNeeds & kTeacherAtT1)) job.row.sums.t1_t = job.row.sums.sum_t;
  const Rows& rows = *job.rows;
  const SoftmaxResult<double> result = formula_of<Loss>(*job.options, job.row);
  const double weight = weight_of(rows, job.index);
  write_loss(job, result.loss);
  for (int term = 0; term < 4 && rows.terms != nullptr; term++)
    rows.terms[term * rows.term_stride + job.index] = float(weight * result.terms[term]);
  SoftmaxGradient<double>& g = job.gradient;
  g = result.gradient;
  if (!(kNeeds & kStudentAtT1)) g.student += g.student_t1;
  g.student *= weight, g.teacher *= weight, g.student_t1 *= weight, g.constant *= weight;
  g.affine *= weight, g.log_ratio *= weight, g.label *= weight;
}

// ---- gradient --------------------------------------------------------------------------------------------------

// Last block first: it is still in cache.
template <unsigned kNeeds>
static void gradient_pass(const RowJob& job, int64_t begin, int64_t end, RowPart&) {
  float z_s[kBlock], z_t[kBlock], recomputed_s[kBlock], recomputed_t[kBlock], recomputed_t1[kBlock];
  const Rows& rows = *job.rows;
  const Row<double>& row = job.row;
  const SoftmaxGradient<double>& g = job.gradient;
  const Cached& cached = job.cached;
  const bool has_cache = cached.student != nullptr;
  const float mean = float(row.student.mean), affine = float(g.affine);
  const float constant = float(g.constant - g.affine * (row.student.mean - mean));
  // Differences of logits: of the logits themselves if the bases are close, which is exact near equality; else relative
  // to the bases.
  const double bases = (double(row.sums.max_t) - row.sums.max_s) * row.student.slope;
  const bool near = __builtin_fabs(bases) < 1;
  const vf origin_s = broadcast(near ? 0.0f : row.sums.max_s), origin_t = broadcast(near ? 0.0f : row.sums.max_t);
  // Their mean is subtracted before the multiplication: exact for a student with all probability on one class.
  const double without_ratio = kNeeds & kLogRatio ? g.student / g.log_ratio - (near ? bases : 0.0) : 0.0;
  const vf mean_difference = broadcast(float(without_ratio / row.student.slope));
  const Exponents exponents = exponents_of(row, row.sums.max_s, row.sums.max_t);
  for (int64_t block = (end - 1) / kBlock; block >= begin / kBlock; block--) {
    const int64_t offset = block * kBlock;
    const int n = block_size(end, offset);
    const Exponentials exponentials =
        has_cache ? cached_block(cached, offset, n) : Exponentials{recomputed_s, recomputed_t, recomputed_t1};
    double below_s = 0, below_t = 0;
    if (has_cache) {
      below_s = double(cached.max_s[block]) - row.sums.max_s;
      below_t = double(cached.max_t[block]) - row.sums.max_t;
      if (kNeeds & (kStandardized | kLogRatio)) load_block(rows.student, job.index, offset, n, z_s);
      if (kNeeds & kLogRatio) load_block(rows.teacher, job.index, offset, n, z_t);
    } else {
      // The label's entry is overwritten below.
      const int padded = load_block(rows.student, job.index, offset, n, z_s);
      load_block(rows.teacher, job.index, offset, n, z_t);
      for (int i = 0; i < padded; i += kLanes) {
        store(recomputed_s + i, student_exponential(exponents, load(z_s + i)));
        store(recomputed_t + i, teacher_exponential(exponents, load(z_t + i)));
        if (kNeeds & kStudentAtT1) store(recomputed_t1 + i, exp_or_zero(load(z_s + i) - exponents.base_s));
      }
    }
    // The maximum is usually found early: the factors are then 1.
    const double factor_s = below_s == 0 ? 1.0 : __builtin_exp(below_s * row.student.slope);
    const double factor_t = below_t == 0 ? 1.0 : __builtin_exp(below_t * row.teacher.slope);
    const double factor_1 = (kNeeds & kStudentAtT1) && below_s != 0 ? __builtin_exp(below_s) : 1.0;
    const vf a = broadcast(float(g.student * factor_s)), b = broadcast(float(g.teacher * factor_t));
    const vf c = broadcast(float(g.student_t1 * factor_1)),
             log_ratio = broadcast(float(g.log_ratio * factor_s * row.student.slope));
    store_block(rows.gradient, job.index, offset, n, [&](int i) __attribute__((always_inline)) {
      const vf exp_u = load(exponentials.student + i);
      if (kNeeds & kLogRatio)
        return exp_u * (log_ratio * (((load(z_t + i) - origin_t) - (load(z_s + i) - origin_s)) + mean_difference));
      vf value = rounded(a * exp_u) - rounded(b * load(exponentials.teacher + i)) + broadcast(constant);
      if (kNeeds & kStudentAtT1) value += c * load(exponentials.t1 + i);
      if (kNeeds & kStandardized) value += broadcast(affine) * (load(z_s + i) - broadcast(mean));
      return value;
    });
  }
  if (job.label_class >= begin && job.label_class < end)
    fill_row(rows.gradient, job.index, job.label_class, 1, float(g.label));
}

template <class Loss, unsigned kNeeds>
static const Phases& softmax_phases() {
  static constexpr Phases standardized = {3,
                                          false,
                                          {moments_pass, statistics_pass<kNeeds>, gradient_pass<kNeeds>},
                                          {combine_moments, combine_statistics<Loss, kNeeds>, nothing_to_combine}};
  static constexpr Phases two_passes = {2,
                                        false,
                                        {statistics_pass<kNeeds>, gradient_pass<kNeeds>, nullptr},
                                        {combine_statistics<Loss, kNeeds>, nothing_to_combine, nullptr}};
  return kNeeds & kStandardized ? standardized : two_passes;
}

// nullptr if the skeleton is not compiled for these needs.
template <class Loss, unsigned... kNeeds>
static const Phases* softmax_phases_for(unsigned needs, VariantList<kNeeds...>) {
  const Phases* found = nullptr;
  (void)(((needs & kCompiledNeeds) == kNeeds && (found = &softmax_phases<Loss, kNeeds>(), true)) || ...);
  return found;
}

template <class Loss>
static const Phases* phases_for(unsigned needs, SoftmaxFamily) {
  return softmax_phases_for<Loss>(needs, typename Loss::Variants());
}

}  // namespace FASTKD_ISA
}  // namespace fastkd

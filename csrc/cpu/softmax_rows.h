// The row skeleton of the softmax family: statistics in one sweep, the row formula, the gradient in a second.
//
// The first sweep reads each logit once, block by block, and keeps its exponentials (relative to the largest
// logit seen so far) in a scratch row; the second turns them into the gradient, so no exponential is computed
// twice and the logits are not read again.
#pragma once

#include "vector.h"

namespace fastkd {
namespace FASTKD_ISA {

typedef SoftmaxStatistics<double> Statistics;
typedef RowScale<double> Scale;

// Mean and deviation (with C - 1) of a row, parts combined as Chan et al. do.
FASTKD_INLINE Scale standardizing_scale(const Matrix& logits, int64_t row, int64_t classes, double temperature) {
  float block[kBlock];
  double mean = 0, squares = 0, seen = 0;
  for (int64_t offset = 0; offset < classes; offset += kBlock) {
    const int n = int(classes - offset < kBlock ? classes - offset : kBlock);
    const int padded = load_block(logits, row, offset, n, block);
    double sum = 0;
    vf sums = {};
    for (int i = n; i < padded; i++) block[i] = 0;
    for (int i = 0; i < padded; i += kLanes) sums += load(block + i);
    sum = horizontal_sum(sums);
    const double block_mean = sum / n;
    for (int i = n; i < padded; i++) block[i] = float(block_mean);
    vf deviations = {};
    for (int i = 0; i < padded; i += kLanes) {
      const vf centred = load(block + i) - broadcast(float(block_mean));
      deviations += centred * centred;
    }
    // float(block_mean) is off by less than a rounding, which adds its square a class: nothing.
    const double step = block_mean - mean, total = seen + n;
    squares += horizontal_sum(deviations) + step * step * seen * n / total;
    mean += step * n / total;
    seen = total;
  }
  const double deviation = __builtin_sqrt(squares / double(classes - 1));
  return {1.0 / ((deviation + kStandardizeEpsilon) * temperature), mean, deviation};
}

struct Blocks {
  float *student, *teacher, *plain;   // exponentials of the row, one a class, by block of kBlock
  float *max_s, *max_t;               // what each block's exponentials are relative to

  Blocks(int64_t classes, bool with_plain) {
    const int64_t blocks = (classes + kBlock - 1) / kBlock, floats = blocks * kBlock;
    student = scratch((with_plain ? 3 : 2) * floats + 2 * blocks);
    teacher = student + floats;
    plain = with_plain ? teacher + floats : nullptr;
    max_s = student + (with_plain ? 3 : 2) * floats;
    max_t = max_s + blocks;
  }
};

// First sweep. kPlain: exponentials at T = 1 too. kStandardized: slopes and means differ between the models.
template <bool kPlain, bool kStandardized>
FASTKD_INLINE Statistics sweep_statistics(const Rows& rows, int64_t row, const Scale& student, const Scale& teacher,
                                          RowLabel& label, int64_t label_class, const Blocks& kept) {
  float z_s[kBlock], z_t[kBlock];
  Statistics total{};
  total.max_s = total.max_t = kMasked;
  const vf slope_s = broadcast(float(student.slope)), slope_t = broadcast(float(teacher.slope));
  const vf power_s = broadcast(float(student.slope * 1.4426950408889634));
  const vf power_t = broadcast(float(teacher.slope * 1.4426950408889634));
  const vf mean_s = broadcast(float(student.mean)), mean_t = broadcast(float(teacher.mean));

  for (int64_t offset = 0, block = 0; offset < rows.classes; offset += kBlock, block++) {
    const int n = int(rows.classes - offset < kBlock ? rows.classes - offset : kBlock);
    const vf top_before_s = broadcast(total.max_s), top_before_t = broadcast(total.max_t);
    vf top_s = top_before_s, top_t = top_before_t;
    const int padded = load_block(rows.student, row, offset, n, z_s, kMasked, top_s);
    load_block(rows.teacher, row, offset, n, z_t, kMasked, top_t);
    const bool here = label.present && label_class >= offset && label_class < offset + n;
    if (here) {
      label.z_s = z_s[label_class - offset];
      label.z_t = z_t[label_class - offset];
      z_s[label_class - offset] = z_t[label_class - offset] = kMasked;
      top_s = top_before_s, top_t = top_before_t;
      for (int i = 0; i < padded; i += kLanes) {
        top_s = at_least(load(z_s + i), top_s);
        top_t = at_least(load(z_t + i), top_t);
      }
    }
    const float max_s = horizontal_max(top_s), max_t = horizontal_max(top_t);
    rebase(total, max_s, max_t, student.slope, teacher.slope);
    kept.max_s[block] = max_s;
    kept.max_t[block] = max_t;

    const vf base_s = broadcast(max_s), base_t = broadcast(max_t);
    vf sum_s = {}, sum_t = {}, dot = {}, sum_1 = {}, moment_s = {}, moment_t = {};
    for (int i = 0; i < padded; i += kLanes) {
      const vf s = load(z_s + i), t = load(z_t + i);
      const vf exp_u = power_of_two_nonpositive((s - base_s) * power_s);
      const vf exp_v = power_of_two_nonpositive((t - base_t) * power_t);
      // Equal logits differ by exactly 0, and masked ones by a number. The slope follows after the sum.
      vf difference = t - s;
      if (kStandardized) {
        const vf centred_u = rounded((s - mean_s) * slope_s);
        difference = rounded((t - mean_t) * slope_t) - centred_u;
        moment_s += exp_u * centred_u;
        moment_t += exp_v * centred_u;
      }
      sum_s += exp_u;
      sum_t += exp_v;
      dot += exp_v * difference;
      store(kept.student + offset + i, exp_u);
      store(kept.teacher + offset + i, exp_v);
      if (kPlain) {
        const vf exp_z = exp_nonpositive(s - base_s);
        sum_1 += exp_z;
        store(kept.plain + offset + i, exp_z);
      }
    }
    total.sum_s += horizontal_sum(sum_s);
    total.sum_t += horizontal_sum(sum_t);
    total.dot += horizontal_sum(dot) * (kStandardized ? 1.0 : teacher.slope);
    total.sum_1 += horizontal_sum(sum_1);
    total.moment_s += horizontal_sum(moment_s);
    total.moment_t += horizontal_sum(moment_t);
  }
  return total;
}

FASTKD_INLINE double logit_sum(const Matrix& logits, int64_t row, int64_t classes) {
  float block[kBlock];
  double total = 0;
  for (int64_t offset = 0; offset < classes; offset += kBlock) {
    const int n = int(classes - offset < kBlock ? classes - offset : kBlock);
    const int padded = load_block(logits, row, offset, n, block);
    for (int i = n; i < padded; i++) block[i] = 0;
    vf sums = {};
    for (int i = 0; i < padded; i += kLanes) sums += load(block + i);
    total += horizontal_sum(sums);
  }
  return total;
}

// Second sweep, last block first: it is the one still in cache.
template <bool kPlain, bool kStandardized>
FASTKD_INLINE void sweep_gradient(const Rows& rows, int64_t row, const Statistics& total, const Scale& student,
                                  const Scale& teacher, const SoftmaxGradient<double>& g, const Blocks& kept) {
  float z_s[kBlock];
  const vf mean = broadcast(float(student.mean)), affine = broadcast(float(g.affine));
  const vf constant = broadcast(float(g.constant));
  for (int64_t block = (rows.classes - 1) / kBlock; block >= 0; block--) {
    const int64_t offset = block * kBlock;
    const int n = int(rows.classes - offset < kBlock ? rows.classes - offset : kBlock);
    const double below_s = double(kept.max_s[block]) - total.max_s, below_t = double(kept.max_t[block]) - total.max_t;
    const vf a = broadcast(float(g.student * __builtin_exp(below_s * student.slope)));
    const vf b = broadcast(float(g.teacher * __builtin_exp(below_t * teacher.slope)));
    const vf e = broadcast(kPlain ? float(g.cross_entropy * __builtin_exp(below_s)) : 0.0f);
    const float *exp_u = kept.student + offset, *exp_v = kept.teacher + offset, *exp_z = kept.plain + offset;
    if (kStandardized) load_block(rows.student, row, offset, n, z_s);
    store_block(rows.gradient, row, offset, n, [&](int i) __attribute__((always_inline)) {
      vf value = rounded(a * load(exp_u + i)) - rounded(b * load(exp_v + i)) + constant;
      if (kPlain) value += e * load(exp_z + i);
      if (kStandardized) value += affine * (load(z_s + i) - mean);
      return value;
    });
  }
}

template <bool kPlain, bool kStandardized>
static void softmax_row(const Rows& rows, const SoftmaxOptions& options, int64_t row) {
  const double weight = weight_of(rows, row);
  const bool with_gradient = rows.gradient.data != nullptr;
  const int64_t classes = rows.classes;
  const bool labelled = rows.target != nullptr;
  const int64_t label_class = labelled ? rows.target[row * rows.target_stride] : -1;
  const bool out_of_range = labelled && (label_class < 0 || label_class >= classes);
  if (weight == 0 || out_of_range) {
    const float value = weight == 0 ? 0.0f : __builtin_nanf("");
    rows.losses[row] = value;
    for (int term = 0; term < 4 && rows.terms != nullptr; term++) rows.terms[term * rows.count + row] = value;
    if (with_gradient) fill_row(rows.gradient, row, 0, classes, value);
    return;
  }

  const Scale plain_scale{1.0 / options.temperature, 0, 0};
  const Scale student =
      kStandardized ? standardizing_scale(rows.student, row, classes, options.temperature) : plain_scale;
  const Scale teacher =
      kStandardized ? standardizing_scale(rows.teacher, row, classes, options.temperature) : plain_scale;
  const Blocks kept(classes, kPlain);
  RowLabel label{labelled, 0, 0};
  Statistics total =
      sweep_statistics<kPlain, kStandardized>(rows, row, student, teacher, label, label_class, kept);
  // At T = 1 the exponentials of the cross-entropy are the student's own.
  if (!kPlain) total.sum_1 = total.sum_s;
  if (options.label_smoothing != 0) total.logit_sum = logit_sum(rows.student, row, classes);
  SoftmaxResult<double> result = softmax_family(options, total, label, student, teacher, classes);

  rows.losses[row] = float(weight * result.loss);
  for (int term = 0; term < 4 && rows.terms != nullptr; term++)
    rows.terms[term * rows.count + row] = float(weight * result.terms[term]);
  if (!with_gradient) return;
  SoftmaxGradient<double> g = result.gradient;
  if (!kPlain) g.student += g.cross_entropy;
  g.student *= weight, g.teacher *= weight, g.cross_entropy *= weight;
  g.constant *= weight, g.affine *= weight, g.label *= weight;
  sweep_gradient<kPlain, kStandardized>(rows, row, total, student, teacher, g, kept);
  if (labelled) fill_row(rows.gradient, row, label_class, 1, float(g.label));
}

static void softmax_rows(const Rows& rows, const SoftmaxOptions& options, int64_t begin, int64_t end) {
  const bool standardized = options.standardized && distils(options);
  const bool plain = options.ce_weight != 0 && (options.temperature != 1.0f || standardized);
  for (int64_t row = begin; row < end; row++) {
    if (plain && standardized) softmax_row<true, true>(rows, options, row);
    else if (plain) softmax_row<true, false>(rows, options, row);
    else if (standardized) softmax_row<false, true>(rows, options, row);
    else softmax_row<false, false>(rows, options, row);
  }
}

}  // namespace FASTKD_ISA
}  // namespace fastkd

// The row skeleton of the softmax family: statistics in one sweep, the row formula, the gradient in a second.
//
// The first sweep reads each logit once, block by block, and keeps its exponentials (relative to the largest
// logit seen so far) in a scratch row; the second turns them into the gradient, so no exponential is computed
// twice and the logits are not read again.
#pragma once

#include "vector.h"

namespace fastkd {
namespace FASTKD_ISA {

// Mean and deviation (with C - 1) of a row, parts combined as Chan et al. do.
FASTKD_INLINE RowScale<double> standardizing_scale(const Matrix& logits, int64_t row, int64_t classes, double temperature) {
  float block[kBlock];
  double mean = 0, squares = 0, seen = 0;
  for (int64_t offset = 0; offset < classes; offset += kBlock) {
    const int n = block_size(classes, offset);
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

// What the first sweep keeps of a row for the second.
struct Kept {
  float *student, *teacher, *plain;  // exponentials, one a class, by block of kBlock
  float *max_s, *max_t;              // what each block's exponentials are relative to
};

static Kept keep(int64_t classes, bool with_plain) {
  const int64_t blocks = (classes + kBlock - 1) / kBlock, floats = blocks * kBlock;
  float* data = scratch((with_plain ? 3 : 2) * floats + 2 * blocks);
  float* after = data + (with_plain ? 3 : 2) * floats;
  return {data, data + floats, with_plain ? data + 2 * floats : nullptr, after, after + blocks};
}

constexpr double kLog2EDouble = 1.4426950408889634;

// First sweep: the sums that kNeeds asks for.
template <unsigned kNeeds>
FASTKD_INLINE void sweep_statistics(const Rows& rows, int64_t index, int64_t label_class, Row<double>& row,
                                    const Kept& kept) {
  float z_s[kBlock], z_t[kBlock];
  SoftmaxStatistics<double>& total = row.sums;
  const bool with_gradient = rows.gradient.data != nullptr;
  total.max_s = total.max_t = kMasked;
  const vf slope_s = broadcast(float(row.student.slope)), slope_t = broadcast(float(row.teacher.slope));
  const vf power_s = broadcast(float(row.student.slope * kLog2EDouble));
  const vf power_t = broadcast(float(row.teacher.slope * kLog2EDouble));
  const vf mean_s = broadcast(float(row.student.mean)), mean_t = broadcast(float(row.teacher.mean));

  for (int64_t offset = 0, block = 0; offset < row.classes; offset += kBlock, block++) {
    const int n = block_size(row.classes, offset);
    const vf top_before_s = broadcast(total.max_s), top_before_t = broadcast(total.max_t);
    vf top_s = top_before_s, top_t = top_before_t;
    const int padded = load_block(rows.student, index, offset, n, z_s, kMasked, top_s);
    load_block(rows.teacher, index, offset, n, z_t, kMasked, top_t);
    if (row.label.present && label_class >= offset && label_class < offset + n) {
      row.label.z_s = z_s[label_class - offset];
      row.label.z_t = z_t[label_class - offset];
      z_s[label_class - offset] = z_t[label_class - offset] = kMasked;
      top_s = top_before_s, top_t = top_before_t;
      for (int i = 0; i < padded; i += kLanes) {
        top_s = at_least(load(z_s + i), top_s);
        top_t = at_least(load(z_t + i), top_t);
      }
    }
    const float max_s = horizontal_max(top_s), max_t = horizontal_max(top_t);
    rebase(total, max_s, max_t, row.student.slope, row.teacher.slope);
    kept.max_s[block] = max_s;
    kept.max_t[block] = max_t;

    const vf base_s = broadcast(max_s), base_t = broadcast(max_t);
    vf sum_s = {}, sum_t = {}, dot_s = {}, dot_t = {}, moment_s = {}, moment_t = {}, entropy_t = {};
    vf plain_s = {}, plain_t = {};
    const Ahead next_s = ahead_of_block(rows.student, rows, index, offset);
    const Ahead next_t = ahead_of_block(rows.teacher, rows, index, offset);
    const Ahead gradient = ahead_at(rows.gradient, index, offset);
    for (int i = 0; i < padded; i += kLanes) {
      fetch(next_s, i);
      fetch(next_t, i);
      if (with_gradient) fetch_to_write(gradient, i);
      const vf s = load(z_s + i), t = load(z_t + i);
      const vf exp_u = power_of_two_nonpositive((s - base_s) * power_s);
      const vf exp_v = power_of_two_nonpositive((t - base_t) * power_t);
      // Equal logits differ by exactly 0, and masked ones by a number. A common slope follows after the sum.
      vf difference = t - s;
      if (kNeeds & kOwnSlopes) {
        const vf u = rounded((s - mean_s) * slope_s);
        difference = rounded((t - mean_t) * slope_t) - u;
        if (kNeeds & kStandardized) {
          moment_s += exp_u * u;
          moment_t += exp_v * u;
        }
      }
      sum_s += exp_u;
      sum_t += exp_v;
      if (kNeeds & kTilt) dot_s += exp_u * difference;
      else dot_t += exp_v * difference;
      if (kNeeds & kTeacherEntropy) entropy_t += exp_v * (t - base_t);
      if (kNeeds & kPlainTeacher) plain_t += exp_nonpositive(t - base_t);
      store(kept.student + offset + i, exp_u);
      store(kept.teacher + offset + i, exp_v);
      if (kNeeds & kPlainStudent) {
        const vf exp_z = exp_nonpositive(s - base_s);
        plain_s += exp_z;
        store(kept.plain + offset + i, exp_z);
      }
    }
    const double common_slope = kNeeds & kOwnSlopes ? 1.0 : row.teacher.slope;
    total.sum_s += horizontal_sum(sum_s);
    total.sum_t += horizontal_sum(sum_t);
    total.dot_s += horizontal_sum(dot_s) * common_slope;
    total.dot_t += horizontal_sum(dot_t) * common_slope;
    total.moment_s += horizontal_sum(moment_s);
    total.moment_t += horizontal_sum(moment_t);
    total.entropy_t += horizontal_sum(entropy_t) * row.teacher.slope;
    total.plain_s += horizontal_sum(plain_s);
    total.plain_t += horizontal_sum(plain_t);
  }
  if (!(kNeeds & kPlainStudent)) total.plain_s = total.sum_s;  // read only where that is what they are
  if (!(kNeeds & kPlainTeacher)) total.plain_t = total.sum_t;
}

FASTKD_INLINE double logit_sum(const Matrix& logits, int64_t row, int64_t classes) {
  float block[kBlock];
  double total = 0;
  for (int64_t offset = 0; offset < classes; offset += kBlock) {
    const int n = block_size(classes, offset);
    const int padded = load_block(logits, row, offset, n, block);
    for (int i = n; i < padded; i++) block[i] = 0;
    vf sums = {};
    for (int i = 0; i < padded; i += kLanes) sums += load(block + i);
    total += horizontal_sum(sums);
  }
  return total;
}

// Second sweep, last block first: it is the one still in cache.
template <unsigned kNeeds>
FASTKD_INLINE void sweep_gradient(const Rows& rows, int64_t index, const Row<double>& row,
                                  const SoftmaxGradient<double>& g, const Kept& kept) {
  float z_s[kBlock], z_t[kBlock];
  const vf mean = broadcast(float(row.student.mean)), affine = broadcast(float(g.affine));
  const vf constant = broadcast(float(g.constant));
  for (int64_t block = (row.classes - 1) / kBlock; block >= 0; block--) {
    const int64_t offset = block * kBlock;
    const int n = block_size(row.classes, offset);
    const double below_s = double(kept.max_s[block]) - row.sums.max_s;
    const double below_t = double(kept.max_t[block]) - row.sums.max_t;
    // Mostly the largest logit came early, and the factors are 1.
    const double factor_s = below_s == 0 ? 1.0 : __builtin_exp(below_s * row.student.slope);
    const double factor_t = below_t == 0 ? 1.0 : __builtin_exp(below_t * row.teacher.slope);
    const double factor_1 = (kNeeds & kPlainStudent) && below_s != 0 ? __builtin_exp(below_s) : 1.0;
    const vf a = broadcast(float(g.student * factor_s)), b = broadcast(float(g.teacher * factor_t));
    const vf c = broadcast(float(g.plain * factor_1)), tilt = broadcast(float(g.tilt * factor_s * row.student.slope));
    const float *exp_u = kept.student + offset, *exp_v = kept.teacher + offset, *exp_z = kept.plain + offset;
    if (kNeeds & (kStandardized | kTilt)) load_block(rows.student, index, offset, n, z_s);
    if (kNeeds & kTilt) load_block(rows.teacher, index, offset, n, z_t);
    store_block(rows.gradient, index, offset, n, [&](int i) __attribute__((always_inline)) {
      if (kNeeds & kTilt) return load(exp_u + i) * (a + tilt * (load(z_t + i) - load(z_s + i)));
      vf value = rounded(a * load(exp_u + i)) - rounded(b * load(exp_v + i)) + constant;
      if (kNeeds & kPlainStudent) value += c * load(exp_z + i);
      if (kNeeds & kStandardized) value += affine * (load(z_s + i) - mean);
      return value;
    });
  }
}

template <unsigned kNeeds>
static void softmax_row(const Rows& rows, const LossOptions& options, int64_t index) {
  Row<double> row{};
  row.classes = rows.classes;
  row.label.present = uses_label(options) && rows.target != nullptr;
  const int64_t label_class = row.label.present ? rows.target[index * rows.target_stride] : -1;
  if (row.label.present && (label_class < 0 || label_class >= rows.classes)) {
    write_whole_row(rows, index, __builtin_nanf(""));
    return;
  }
  slopes_of(options, row.student.slope, row.teacher.slope);
  if (kNeeds & kStandardized) {
    row.student = standardizing_scale(rows.student, index, rows.classes, options.values[0]);
    row.teacher = standardizing_scale(rows.teacher, index, rows.classes, options.values[0]);
  }
  const Kept kept = keep(rows.classes, kNeeds & kPlainStudent);
  sweep_statistics<kNeeds>(rows, index, label_class, row, kept);
  if (options.loss == Loss::kSoftmax && options.softmax.label_smoothing != 0)
    row.sums.logit_sum = logit_sum(rows.student, index, rows.classes);
  const SoftmaxResult<double> result = apply_formula(options, row);

  const double weight = weight_of(rows, index);
  rows.losses[index] = float(weight * result.loss);
  for (int term = 0; term < 4 && rows.terms != nullptr; term++)
    rows.terms[term * rows.count + index] = float(weight * result.terms[term]);
  if (rows.gradient.data == nullptr) return;
  SoftmaxGradient<double> g = result.gradient;
  if (!(kNeeds & kPlainStudent)) g.student += g.plain;
  g.student *= weight, g.teacher *= weight, g.plain *= weight, g.constant *= weight;
  g.affine *= weight, g.tilt *= weight, g.label *= weight;
  sweep_gradient<kNeeds>(rows, index, row, g, kept);
  if (row.label.present) fill_row(rows.gradient, index, label_class, 1, float(g.label));
}

typedef void (*RowFunction)(const Rows&, const LossOptions&, int64_t index);

// The skeleton as compiled for what a loss needs.
static RowFunction softmax_row_for(const LossOptions& options) {
  switch (needs_of(options)) {
    case 0: return softmax_row<0>;
    case kPlainStudent: return softmax_row<kPlainStudent>;
    case kOwnSlopes | kStandardized: return softmax_row<kOwnSlopes | kStandardized>;
    case kPlainStudent | kOwnSlopes | kStandardized: return softmax_row<kPlainStudent | kOwnSlopes | kStandardized>;
    case kTeacherEntropy: return softmax_row<kTeacherEntropy>;
    case kTeacherEntropy | kPlainStudent | kPlainTeacher:
      return softmax_row<kTeacherEntropy | kPlainStudent | kPlainTeacher>;
    case kOwnSlopes | kPlainTeacher: return softmax_row<kOwnSlopes | kPlainTeacher>;
    case kTilt: return softmax_row<kTilt>;
    default: return nullptr;
  }
}

}  // namespace FASTKD_ISA
}  // namespace fastkd

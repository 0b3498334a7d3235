// Rows whose teacher is known at K classes: gather_rows sums the exponentials of the other classes and writes the
// student's row of K + 1 classes, the kernel of the loss computes value and gradient of that, and scatter_rows writes
// the gradient of all classes. docs/formulas.md has the formulas; cpu/top_k_rows.h does the same.
#pragma once

#include "softmax_rows.h"

namespace fastkd {
namespace cuda {

// A row as both kernels see it.
struct TopKRow {
  RowInfo info;
  bool computed, cross_entropy, at_t1;  // at_t1: the cross-entropy needs exponentials of its own
  const int64_t* known;                 // [count]; count is 0 if the row is not computed
  int count;
  float *student, *gradient;  // [count + 1], in the workspace
  float slope;
};

FASTKD_DEVICE TopKRow top_k_row(const TopKArguments& arguments, int64_t index) {
  const Rows& rows = arguments.rows;
  const unsigned needs = arguments.options.needs;
  const int64_t at = index * (arguments.known.count + 1);
  TopKRow row;
  row.info = row_info(rows, index, (needs & kLabelled) && rows.target != nullptr);
  row.computed = row.info.kind == RowKind::kComputed;
  row.cross_entropy = (needs & kCrossEntropy) != 0, row.at_t1 = (needs & kStudentAtT1) != 0;
  row.known = arguments.known.indices + index * arguments.known.stride;
  row.count = row.computed ? int(arguments.known.count) : 0;
  row.student = arguments.workspace.student + at, row.gradient = arguments.workspace.gradient + at;
  float teacher_slope;
  slopes_of(options_of(arguments), row.slope, teacher_slope);
  return row;
}

// The member's share of the student's row; the teacher's has other classes, and is not read.
template <class Type>
FASTKD_DEVICE Share<Type, false> student_share(const Team& team, const TopKArguments& arguments, int64_t index,
                                               bool computed) {
  const Rows& rows = arguments.rows;
  return Share<Type, false>(team, arguments.plan, rows.student, rows.student, index, computed ? int(rows.classes) : 0);
}

// A member's sums: of the others' exponentials, and of all logits.
template <class Type>
FASTKD_DEVICE void sum_others(const Share<Type, false>& share, const TopKRow& row, bool smoothing, float origin,
                              int classes, SoftmaxStatistics<float>& sums) {
  const float power = row.slope * kLog2E, room = headroom(row.at_t1, row.slope);
  const int label = row.cross_entropy ? row.info.label : -1;
  int next = 0;  // the first known class of the next vector, or one before it
  sums.max_s = kMasked;
  share.first_pass([&](int column, Vector<Type>& student, const Vector<Type>&) {
    float (&z)[kVector] = student.z;
    if (smoothing) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kVector; i++) sum += is_inside(column + i, classes) ? z[i] - origin : 0.0f;
      sums.logit_sum += sum;
    }
    unsigned left_out = is_inside(label - column, kVector) ? 1u << (label - column) : 0;
    next = first_known(row.known, next, row.count, column);
    for (; next < row.count && row.known[next] < column + kVector; next++)
      left_out |= 1u << int(row.known[next] - column);
#pragma unroll
    for (int i = 0; i < kVector; i++)
      if (left_out >> i & 1) z[i] = kMasked;
    const float top = largest_of(z, sums.max_s);
    if (top > sums.max_s + room) rebase<kStudentAtT1>(sums, top, sums.max_t, row.slope, row.slope);
    float sum = 0, sum_t1 = 0;  // per vector: fewer roundings
#pragma unroll
    for (int i = 0; i < kVector; i++) {
      const float x = z[i] - sums.max_s;
      sum += power_of_two(x * power);
      if (row.at_t1) sum_t1 += power_of_two(x * kLog2E);
    }
    sums.sum_s += sum;
    sums.t1_s += sum_t1;
  });
}

// The cross-entropy of the whole row. `sums` are of the others; `known_t1` of the known classes without the label,
// relative to base_t1.
FASTKD_DEVICE void add_cross_entropy(const LossOptions& options, float weight, const SoftmaxStatistics<float>& sums,
                                     float known_t1, Row<float>& whole, TopKStatistics& statistics) {
  whole.sums.max_s = statistics.base_t1;
  whole.sums.t1_s = sums.t1_s * power_of_two((statistics.base - statistics.base_t1) * kLog2E) + known_t1;
  whole.sums.logit_sum = sums.logit_sum;
  LossOptions of_student = options;
  of_student.needs &= kCrossEntropy | kLabelSmoothing;
  const SoftmaxResult<float> result = formula_of<Softmax>(of_student, whole);
  statistics.ce_loss = weight * result.loss;
  statistics.ce_term = weight * result.terms[0];
  // gradient.student is 0, or NaN if the label's logit is not finite.
  statistics.t1 = weight * (result.gradient.student_t1 + result.gradient.student);
  statistics.constant = weight * result.gradient.constant;
  statistics.label = weight * result.gradient.label;
}

// Writes the student's row of K + 1 classes, as T log q: rounding then is as small as the classes' shares. And the
// row's statistics; of a row that is not computed the position only, which is out of range.
template <class Type>
FASTKD_KERNEL(kRegisters<Type>)
gather_rows(FASTKD_PARAMETER TopKArguments arguments) {
  const Rows& rows = arguments.rows;
  Team team(arguments.plan);
  const int64_t index = team.row();
  const TopKRow row = top_k_row(arguments, index);
  const LossOptions options = options_of(arguments);
  const Share<Type, false> share = student_share<Type>(team, arguments, index, row.computed);
  const bool smoothing = (options.needs & kLabelSmoothing) != 0;
  const int label = row.info.label;
  uint32_t label_bits = 0, origin_bits = 0;
  if (row.computed && smoothing) origin_bits = load_logit(share.student(), 0);
  if (label >= 0) label_bits = load_logit(share.student(), label);
  int position = label >= 0 ? first_known(row.known, 0, row.count, label) : row.count;
  if (position == row.count || row.known[position] != label) position = -1;

  SoftmaxStatistics<float> sums{};
  const Type type = share.student().type;
  const float z_label = value_of(label_bits, type), origin = value_of(origin_bits, type);
  sum_others(share, row, smoothing, origin, int(rows.classes), sums);
  const Max larger;
  float tops[] = {sums.max_s, kMasked, kMasked};  // of the others, the known, the known without the label
  for (int i = team.member(); i < row.count; i += team.size()) {
    const float z = value_of(load_logit(share.student(), row.known[i]), share.student().type);
    row.student[i] = z;
    tops[1] = larger(z, tops[1]);
    if (i != position) tops[2] = larger(z, tops[2]);
  }
  team.all_reduce(tops, Max());
  rebase<kStudentAtT1>(sums, tops[0], sums.max_t, row.slope, row.slope);

  // The rest is the others, and the label if it was left out.
  const bool label_in_rest = row.cross_entropy && label >= 0 && position < 0;
  const float base_rest = label_in_rest ? larger(z_label, tops[0]) : tops[0];
  const float base = larger(tops[1], base_rest), base_t1 = larger(tops[2], tops[0]), power = row.slope * kLog2E;
  float values[] = {sums.sum_s, sums.t1_s, sums.logit_sum, 0.0f, 0.0f};  // and of the known, relative to these bases
  for (int i = team.member(); i < row.count; i += team.size()) {
    const float z = row.student[i];
    values[3] += power_of_two((z - base) * power);
    if (row.cross_entropy && i != position) values[4] += power_of_two((z - base_t1) * kLog2E);
  }
  team.all_reduce(values, Sum());
  team.arrive_before_exit();

  sums.sum_s = values[0], sums.t1_s = row.at_t1 ? values[1] : values[0], sums.logit_sum = values[2];
  if (tops[0] == kMasked && sums.sum_s == sums.sum_s)  // all others are masked, and the padding with them
    sums.sum_s = sums.t1_s = float(rows.classes);
  const float others_in_rest = power_of_two((tops[0] - base_rest) * power);
  const float label_exp = label_in_rest ? power_of_two((z_label - base_rest) * power) : 0.0f;
  const float rest_sum = sums.sum_s * others_in_rest + label_exp;
  const bool masked = base_rest == kMasked && rest_sum == rest_sum;
  const float rest_exp = masked ? 0.0f : rest_sum * power_of_two((base_rest - base) * power);
  const float total = values[3] + rest_exp, log_total = logf(total) / row.slope;
  if (row.computed) {
    for (int i = team.member(); i < row.count; i += team.size()) {
      const float z = row.student[i];
      row.student[i] = z == kMasked ? kMasked : (z - base) - log_total;
    }
  }
  if (team.member() == 0 && row.info.kind != RowKind::kPastEnd) {
    TopKStatistics statistics{};
    statistics.position = position;
    if (row.computed) {
      // Where the rest has most of the probability, its logarithm is that of 1 - the others.
      const float log_rest = rest_exp > values[3] ? -log1pf(values[3] / rest_exp) / row.slope
                                                  : (base_rest - base) + log_ratio(rest_sum, total) / row.slope;
      row.student[row.count] = masked ? kMasked : log_rest;
      statistics.base = tops[0], statistics.base_t1 = base_t1;
      statistics.share = others_in_rest / rest_sum, statistics.label_share = label_exp / rest_sum;
      if (row.cross_entropy) {
        Row<float> whole{};
        whole.label = {true, z_label, 0.0f};
        whole.origin = origin;
        whole.classes = rows.classes;
        add_cross_entropy(options, row.info.weight, sums, values[4], whole, statistics);
      }
    }
    arguments.workspace.statistics[index] = statistics;
  }
  team.wait_before_exit();
}

// A member's vectors of the gradient, as if no class were known.
template <class Type>
FASTKD_DEVICE void write_rest(const Share<Type, false>& share, const RowPointer<Type>& gradient, const TopKRow& row,
                              int classes, float rest_gradient, const TopKStatistics& statistics) {
  const float t1 = statistics.t1 * power_of_two((statistics.base - statistics.base_t1) * kLog2E);
  const float shared = rest_gradient * statistics.share, factor = row.at_t1 ? shared : shared + t1;
  const float power = row.slope * kLog2E;
  share.first_pass([&](int column, Vector<Type>& student, const Vector<Type>&) {
    float (&z)[kVector] = student.z;
    float values[kVector];
#pragma unroll
    for (int i = 0; i < kVector; i++) {
      const float x = z[i] - statistics.base;  // of a known class perhaps too large: overwritten later
      values[i] = fused(factor, power_of_two(x * power), statistics.constant);
      if (row.at_t1) values[i] = fused(t1, power_of_two(x * kLog2E), values[i]);
    }
    store_vector(gradient, column, classes, values);
  });
}

// Adds the cross-entropy to the row's loss, and writes the gradient.
template <class Type>
FASTKD_KERNEL(kRegisters<Type>)
scatter_rows(FASTKD_PARAMETER TopKArguments arguments) {
  const Rows& rows = arguments.rows;
  Team team(arguments.plan);
  const int64_t index = team.row();
  const TopKRow row = top_k_row(arguments, index);
  const bool with_gradient = rows.gradient.data != nullptr, writes = row.computed && with_gradient;
  const Share<Type, false> share = student_share<Type>(team, arguments, index, writes);
  const RowPointer<Type> gradient = gradient_row(rows, index, share);
  float of_known[] = {0.0f};
  if (writes)
    for (int i = team.member(); i < row.count; i += team.size()) of_known[0] += row.gradient[i];
  team.all_reduce(of_known, Sum());

  TopKStatistics statistics{};
  float rest_gradient = 0;
  if (!row.computed) {
    write_uncomputed<Type>(team, rows, index, row.info.kind);
  } else {
    statistics = arguments.workspace.statistics[index];
    if (row.cross_entropy && team.member() == 0) {
      rows.losses[index] += statistics.ce_loss;
      if (rows.terms != nullptr) rows.terms[index] += statistics.ce_term;
    }
    if (writes) {
      // A gradient of logits sums to 0. Of a class with most of the probability it is itself a difference that cancels.
      rest_gradient = row.student[row.count] * row.slope < -0.7f ? row.gradient[row.count] : -of_known[0];
      write_rest(share, gradient, row, int(rows.classes), rest_gradient, statistics);
    }
  }
  team.barrier();  // the vectors of the rest hold known classes, and the label
  if (!writes) return;
  for (int i = team.member(); i < row.count; i += team.size()) {
    float value = row.gradient[i];
    if (row.cross_entropy) {
      const float z = value_of(load_logit(share.student(), row.known[i]), share.student().type);
      const float t1 = fused(statistics.t1, power_of_two((z - statistics.base_t1) * kLog2E), statistics.constant);
      value += i == statistics.position ? statistics.label : t1;
    }
    store_logit(gradient, row.known[i], value);
  }
  if (row.cross_entropy && statistics.position < 0 && team.member() == 0)
    store_logit(gradient, row.info.label, statistics.label + rest_gradient * statistics.label_share);
}

}  // namespace cuda
}  // namespace fastkd

// The row skeleton of the softmax family: a pass for the statistics, the row formula, a pass for the gradient.
#pragma once

#include "prologue_epilogue.h"
#include "scalar_math.h"

namespace fastkd {
namespace cuda {

// Calls visit on every sum that kNeeds includes.
template <unsigned kNeeds, class Visit>
FASTKD_DEVICE void each_sum(SoftmaxStatistics<float>& sums, const Visit& visit) {
  visit(sums.sum_s);
  visit(sums.sum_t);
  if (!(kNeeds & kSumsOnly)) {
    visit(kNeeds & kCrossTerm ? sums.cross_t : kNeeds & kLogRatio ? sums.dot_s : sums.dot_t);
    visit(sums.logit_sum);
  }
  if (kNeeds & kStudentAtT1) visit(sums.t1_s);
  if (kNeeds & kTeacherAtT1) visit(sums.t1_t);
  if (kNeeds & kStandardized) visit(sums.moment_s), visit(sums.moment_t);
}

template <unsigned kNeeds>
constexpr int kSumCount = (kNeeds & kSumsOnly ? 2 : 4) + (kNeeds & kStudentAtT1 ? 1 : 0) +
                          (kNeeds & kTeacherAtT1 ? 1 : 0) + (kNeeds & kStandardized ? 2 : 0);

template <unsigned kNeeds>
FASTKD_DEVICE void list_sums(SoftmaxStatistics<float>& sums, float (&values)[kSumCount<kNeeds>]) {
  int i = 0;
  each_sum<kNeeds>(sums, [&](float& sum) { values[i++] = sum; });
}

// The sums of all members, relative to the largest base.
template <unsigned kNeeds>
FASTKD_DEVICE void combine_statistics(Team& team, Row<float>& row) {
  float bases[] = {row.sums.max_s, row.sums.max_t};
  team.all_reduce(bases, Max());
  rebase<kNeeds>(row.sums, bases[0], bases[1], row.student.slope, row.teacher.slope);
  float values[kSumCount<kNeeds>];
  list_sums<kNeeds>(row.sums, values);
  team.all_reduce(values, Sum());
  int i = 0;
  each_sum<kNeeds>(row.sums, [&](float& sum) { sum = values[i++]; });
  if (!(kNeeds & kOwnSlopes)) row.sums.dot_s *= row.teacher.slope, row.sums.dot_t *= row.teacher.slope;
  row.sums.cross_t *= row.student.slope;
  // Without these needs T is 1 if the formula reads the sums at T = 1.
  if (!(kNeeds & kStudentAtT1)) row.sums.t1_s = row.sums.sum_s;
  if (!(kNeeds & kTeacherAtT1)) row.sums.t1_t = row.sums.sum_t;
}

// The bases of a member's sums: where they are, and from where on a logit moves them.
template <unsigned kNeeds, class Type>
struct Bases {
  FASTKD_DEVICE Bases(const Row<float>& row)
      : headroom_s(headroom(kNeeds & kStudentAtT1, row.student.slope)),
        headroom_t(headroom(kNeeds & kTeacherAtT1, row.teacher.slope)) {
    update(row.sums);
  }
  FASTKD_DEVICE void update(const SoftmaxStatistics<float>& sums) {
    bound_s = bound_of<Type>(sums.max_s + headroom_s);
    bound_t = bound_of<Type>(sums.max_t + headroom_t);
  }

  float headroom_s, headroom_t;
  uint32_t bound_s, bound_t;
};

// A member's sums over its share, which `pass` visits. The label, -1 for none, is excluded.
template <unsigned kNeeds, class Type, class Pass>
FASTKD_DEVICE void sum_share(const Pass& pass, int label, bool with_logit_sum, Row<float>& row) {
  SoftmaxStatistics<float>& sums = row.sums;
  const RowScale<float> student = row.student, teacher = row.teacher;
  const float masked = kNeeds & kOwnSlopes ? masked_value(row) : kMasked;
  sums.max_s = sums.max_t = masked;
  Bases<kNeeds, Type> bases(row);
  const float power_s = student.slope * kLog2E, power_t = teacher.slope * kLog2E;
  const int classes = int(row.classes);

  pass([&](int column, Vector<Type>& student_vector, Vector<Type>& teacher_vector) {
    float(&s)[kVector] = student_vector.z, (&t)[kVector] = teacher_vector.z;
    if (with_logit_sum) {
      float sum = 0;
      for (int i = 0; i < kVector; i++) sum += is_inside(column + i, classes) ? s[i] - row.origin : 0.0f;
      sums.logit_sum += sum;
    }
    if (kNeeds & kOwnSlopes) {
#pragma unroll
      for (int i = 0; i < kVector; i++) s[i] = larger_or_nan(s[i], masked), t[i] = larger_or_nan(t[i], masked);
    }
    const bool has_label = is_inside(label - column, kVector);
    if (has_label | student_vector.exceeds(bases.bound_s) | teacher_vector.exceeds(bases.bound_t)) {
#pragma unroll
      for (int i = 0; i < kVector; i++)
        if (column + i == label) s[i] = t[i] = masked;
      rebase<kNeeds>(sums, largest_of(s, sums.max_s), largest_of(t, sums.max_t), student.slope, teacher.slope);
      bases.update(sums);
    }
    SoftmaxStatistics<float> part{};  // per vector: fewer roundings
#pragma unroll
    for (int i = 0; i < kVector; i++) {
      // The differences are formed from the same rounded values as the exponentials: rounding then acts on the
      // divergence only like a perturbation of the logits.
      const float x_s = s[i] - sums.max_s, x_t = t[i] - sums.max_t;
      const float exp_u = power_of_two(x_s * power_s), exp_v = power_of_two(x_t * power_t);
      const auto add = [i](float& sum, float value) { sum = i == 0 ? value : sum + value; };
      const auto add_product = [i](float& sum, float a, float b) { sum = i == 0 ? a * b : fused(a, b, sum); };
      add(part.sum_s, exp_u);
      add(part.sum_t, exp_v);
      if (kNeeds & kCrossTerm) {
        add_product(part.cross_t, exp_v, x_s);
      } else if (!(kNeeds & kSumsOnly)) {
        // Exactly 0 for equal logits, finite for masked ones. A common slope is applied to the sum.
        const float difference = kNeeds & kOwnSlopes ? x_t * teacher.slope - x_s * student.slope : x_t - x_s;
        if (kNeeds & kLogRatio) add_product(part.dot_s, exp_u, difference);
        else add_product(part.dot_t, exp_v, difference);
      }
      if (kNeeds & kStandardized) {
        const float above_mean = s[i] - student.mean;
        add_product(part.moment_s, exp_u, above_mean);
        add_product(part.moment_t, exp_v, above_mean);
      }
      if (kNeeds & kStudentAtT1) add(part.t1_s, power_of_two(x_s * kLog2E));
      if (kNeeds & kTeacherAtT1) add(part.t1_t, power_of_two(x_t * kLog2E));
    }
    float values[kSumCount<kNeeds>];
    list_sums<kNeeds>(part, values);
    int i = 0;
    each_sum<kNeeds>(sums, [&](float& sum) { sum += values[i++]; });
  });
}

// The squares of a constant row may be below 0 by rounding. Propagates NaN.
FASTKD_DEVICE float deviation_of(float squares, int classes) {
  return squares < 0 ? 0.0f : sqrtf(squares / float(classes - 1));
}

// Sets the scales of both models for (z - mean) / (deviation + epsilon) / T; deviation with C - 1.
template <class Type>
FASTKD_DEVICE void standardize(Team& team, const Share<Type>& share, Row<float>& row) {
  const int classes = int(row.classes);
  float sums[] = {0.0f, 0.0f};
  share.first_pass([&](int column, const Vector<Type>& s, const Vector<Type>& t) {
    for (int i = 0; i < kVector; i++) {
      if (!is_inside(column + i, classes)) continue;
      sums[0] += s.z[i];
      sums[1] += t.z[i];
    }
  });
  team.all_reduce(sums, Sum());
  // Two steps: these sums are inexact for logits far from 0, so the deviations from them correct the means.
  row.student.mean = sums[0] / float(classes);
  row.teacher.mean = sums[1] / float(classes);
  float deviations[] = {0.0f, 0.0f, 0.0f, 0.0f};  // sums, and sums of squares
  share.next_pass([&](int column, const Vector<Type>& s, const Vector<Type>& t) {
    for (int i = 0; i < kVector; i++) {
      if (!is_inside(column + i, classes)) continue;
      const float from_mean_s = s.z[i] - row.student.mean, from_mean_t = t.z[i] - row.teacher.mean;
      deviations[0] += from_mean_s;
      deviations[1] += from_mean_t;
      deviations[2] = fused(from_mean_s, from_mean_s, deviations[2]);
      deviations[3] = fused(from_mean_t, from_mean_t, deviations[3]);
    }
  });
  team.all_reduce(deviations, Sum());
  row.student.mean_rest = deviations[0] / float(classes);
  row.teacher.mean_rest = deviations[1] / float(classes);
  row.student.deviation = deviation_of(deviations[2] - deviations[0] * row.student.mean_rest, classes);
  row.teacher.deviation = deviation_of(deviations[3] - deviations[1] * row.teacher.mean_rest, classes);
  row.student.slope /= row.student.deviation + kStandardizeEpsilon;
  row.teacher.slope /= row.teacher.deviation + kStandardizeEpsilon;
}

template <unsigned kNeeds, class Type>
FASTKD_DEVICE void write_gradient(const Share<Type>& share, const RowPointer<Type>& gradient, int label,
                                  const Row<float>& row, const SoftmaxGradient<float>& g) {
  const float power_s = row.student.slope * kLog2E, power_t = row.teacher.slope * kLog2E;
  const float max_s = row.sums.max_s, max_t = row.sums.max_t, log_ratio = g.log_ratio * row.student.slope;
  const int classes = int(row.classes);
  // Differences of logits: of the logits themselves if the bases are close, which is exact near equality; else relative
  // to the bases.
  const float bases = (max_t - max_s) * row.student.slope;
  const bool near = fabsf(bases) < 1.0f;
  const float origin_s = near ? 0.0f : max_s, origin_t = near ? 0.0f : max_t;
  const float without_ratio = near ? g.student - g.log_ratio * bases : g.student;
  share.next_pass([&](int column, const Vector<Type>& student, const Vector<Type>& teacher) {
    const float(&s)[kVector] = student.z, (&t)[kVector] = teacher.z;
    float values[kVector];
#pragma unroll
    for (int i = 0; i < kVector; i++) {
      const float above_s = s[i] - max_s;
      const float exp_u = power_of_two(above_s * power_s);
      if (kNeeds & kLogRatio) {
        values[i] = exp_u * fused(log_ratio, (t[i] - origin_t) - (s[i] - origin_s), without_ratio);
        continue;
      }
      const float exp_v = power_of_two((t[i] - max_t) * power_t);
      values[i] = g.student * exp_u - g.teacher * exp_v;  // equal products cancel: no multiply-add
      if (kNeeds & kStudentAtT1) values[i] = fused(g.student_t1, power_of_two(above_s * kLog2E), values[i]);
      if (kNeeds & kStandardized) values[i] = fused(g.affine, above_mean(s[i], row.student), values[i]);
    }
    if (g.constant != 0) {
#pragma unroll
      for (float& value : values) value += g.constant;
    }
    if (is_inside(label - column, kVector)) {
      for (int i = 0; i < kVector; i++)
        if (column + i == label) values[i] = g.label;
    }
    store_vector(gradient, column, classes, values);
  });
}

template <class Loss, unsigned kNeeds, class Type>
FASTKD_KERNEL softmax_rows(FASTKD_PARAMETER RowLossArguments arguments) {
  const Rows& rows = arguments.pairs[block_y()];
  Team team(arguments.plan);
  const int64_t index = team.row();
  const unsigned needs = arguments.options.needs;
  const bool labelled = (needs & kLabelled) && rows.target != nullptr;
  const RowInfo info = row_info(rows, index, labelled);
  const int label = info.label;
  const Share<Type> share = share_of<Type>(team, arguments, rows, index, info.kind);
  const bool with_logit_sum = (needs & kLabelSmoothing) != 0;
  uint32_t label_s = 0, label_t = 0, origin = 0;
  if (label >= 0) {
    if (with_logit_sum) origin = load_logit(share.student(), 0);
    label_s = load_logit(share.student(), label);
    if (needs & kDistills) label_t = load_logit(row_of<Type>(rows.teacher, index), label);
  }

  Row<float> row{};
  row.classes = rows.classes;
  slopes_of(options_of(arguments), row.student.slope, row.teacher.slope);
  const Type type = share.student().type;
  row.origin = value_of(origin, type);
  if (kNeeds & kStandardized) {
    standardize(team, share, row);
    sum_share<kNeeds, Type>([&](const auto& visit) { share.next_pass(visit); }, label, with_logit_sum, row);
  } else {
    sum_share<kNeeds, Type>([&](const auto& visit) { share.first_pass(visit); }, label, with_logit_sum, row);
  }
  combine_statistics<kNeeds>(team, row);
  team.arrive_before_exit();

  if (info.kind != RowKind::kComputed) {
    write_uncomputed<Type>(team, rows, index, info.kind);
  } else {
    row.label = {label >= 0, value_of(label_s, type), value_of(label_t, Type(rows.teacher.dtype))};
    SoftmaxResult<float> result = formula_of<Loss>(options_of(arguments), row);
    const float weight = info.weight;
    for (float& term : result.terms) term *= weight;
    write_losses(team, rows, index, weight * result.loss, result.terms);
    if (rows.gradient.data != nullptr) {
      SoftmaxGradient<float> g = result.gradient;
      if (!(kNeeds & kStudentAtT1)) g.student += g.student_t1;
      g.student *= weight, g.teacher *= weight, g.student_t1 *= weight, g.constant *= weight;
      g.affine *= weight, g.log_ratio *= weight, g.label *= weight;
      write_gradient<kNeeds, Type>(share, gradient_row(rows, index, share), label, row, g);
    }
  }
  team.wait_before_exit();
}

}  // namespace cuda
}  // namespace fastkd

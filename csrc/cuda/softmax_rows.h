// The row skeleton of the softmax family: a pass for the statistics, the row formula, a pass for the gradient.
#pragma once

#include "prologue_epilogue.h"
#include "scalar_math.h"

namespace fastkd {
namespace cuda {

template <unsigned kNeeds>
constexpr bool kHasDot = (kNeeds & kDistills) && !(kNeeds & kSumsOnly);

// Calls visit on every sum that kNeeds includes, without logit_sum.
template <unsigned kNeeds, class Visit>
FASTKD_DEVICE void each_sum(SoftmaxStatistics<float>& sums, const Visit& visit) {
  visit(sums.sum_s);
  if (kNeeds & kDistills) visit(sums.sum_t);
  if (kHasDot<kNeeds>) visit(kNeeds & kCrossTerm ? sums.cross_t : kNeeds & kLogRatio ? sums.dot_s : sums.dot_t);
  if (kNeeds & kStudentAtT1) visit(sums.t1_s);
  if (kNeeds & kTeacherAtT1) visit(sums.t1_t);
  if (kNeeds & kStandardized) visit(sums.moment_s), visit(sums.moment_t);
}

template <unsigned kNeeds>
constexpr int kSumCount =
    1 + (kNeeds & kDistills ? 1 : 0) + (kHasDot<kNeeds> ? 1 : 0) + (kNeeds & kStudentAtT1 ? 1 : 0) +
    (kNeeds & kTeacherAtT1 ? 1 : 0) + (kNeeds & kStandardized ? 2 : 0);

// The differences t - s of reverse KL's dot_s are relative to `origin_t` - max_s: the teacher's logit at the class of the
// student's base. For a student with one probability dot_s is then 0, and its mean exact.
struct Difference {
  float origin_t, mean;
};

// Before the student's base becomes max_s.
FASTKD_DEVICE void rebase_difference(SoftmaxStatistics<float>& sums, float max_s, float origin_t, float slope,
                                     Difference& difference) {
  if (sums.sum_s != 0) {
    const float below_s = sums.max_s - max_s, factor = expf(below_s * slope);
    const float step = (difference.origin_t - origin_t) - below_s;
    sums.dot_s = factor != 0 ? factor * fused(step, sums.sum_s, sums.dot_s) : 0.0f;
  }
  difference.origin_t = origin_t;
}

// The sums of all members, relative to the largest base.
template <unsigned kNeeds>
FASTKD_DEVICE void combine_statistics(Team& team, Row<float>& row, Difference& difference) {
  float bases[] = {row.sums.max_s, row.sums.max_t};
  team.all_reduce(bases, Max());
  if (kNeeds & kLogRatio) {
    float origins[] = {row.sums.max_s == bases[0] ? difference.origin_t : kMasked};
    team.all_reduce(origins, Max());
    rebase_difference(row.sums, bases[0], origins[0], row.student.slope, difference);
  }
  rebase<kNeeds & ~unsigned(kLogRatio)>(row.sums, bases[0], bases[1], row.student.slope, row.teacher.slope);
  float values[kSumCount<kNeeds> + 1] = {row.sums.logit_sum};
  int i = 1;
  each_sum<kNeeds>(row.sums, [&](float& sum) { values[i++] = sum; });
  team.all_reduce(values, Sum());
  row.sums.logit_sum = values[0];
  i = 1;
  each_sum<kNeeds>(row.sums, [&](float& sum) { sum = values[i++]; });
  if (kNeeds & kLogRatio) {
    difference.mean = row.sums.dot_s / row.sums.sum_s;
    row.sums.dot_s = (difference.mean + (difference.origin_t - row.sums.max_t)) * row.sums.sum_s;
  }
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
FASTKD_DEVICE void sum_share(const Pass& pass, int label, bool with_logit_sum, Row<float>& row,
                             Difference& difference) {
  SoftmaxStatistics<float>& sums = row.sums;
  const RowScale<float> student = row.student, teacher = row.teacher;
  const float masked = kNeeds & kOwnSlopes ? masked_value(row) : kMasked;
  sums.max_s = sums.max_t = masked;
  Bases<kNeeds, Type> bases(row);
  const float power_s = student.slope * kLog2E, power_t = teacher.slope * kLog2E;
  const int classes = int(row.classes);

  pass([&](int column, Vector<Type>& student_vector, Vector<Type>& teacher_vector) {
    float (&s)[kVector] = student_vector.z, (&t)[kVector] = teacher_vector.z;
    if (with_logit_sum) {
      float sum = 0;
      for (int i = 0; i < kVector; i++) sum += is_inside(column + i, classes) ? s[i] - row.origin : 0.0f;
      sums.logit_sum += sum;
    }
    if (kNeeds & kOwnSlopes) {
#pragma unroll
      for (int i = 0; i < kVector; i++) s[i] = larger_or_nan(s[i], masked), t[i] = larger_or_nan(t[i], masked);
    }
    exclude_outside(column, classes, masked, student_vector, teacher_vector);
    const bool has_label = is_inside(label - column, kVector);
    const bool exceeds_t = (kNeeds & kDistills) && teacher_vector.exceeds(bases.bound_t);
    const bool lacks_origin = (kNeeds & kLogRatio) && difference.origin_t == kMasked;
    if (has_label | lacks_origin | student_vector.exceeds(bases.bound_s) | exceeds_t) {
#pragma unroll
      for (int i = 0; i < kVector; i++)
        if (column + i == label) s[i] = t[i] = excluded_below(masked);
      const float top_s = largest_of(s, sums.max_s), top_t = largest_of(t, sums.max_t);
      if (kNeeds & kLogRatio) {
        float origin_t = difference.origin_t;
        const bool moves = top_s > sums.max_s || origin_t == kMasked;
#pragma unroll
        for (int i = 0; i < kVector; i++) origin_t = moves && s[i] == top_s ? t[i] : origin_t;
        rebase_difference(sums, top_s, origin_t, student.slope, difference);
      }
      rebase<kNeeds & ~unsigned(kLogRatio)>(sums, top_s, top_t, student.slope, teacher.slope);
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
      if (kNeeds & kDistills) add(part.sum_t, exp_v);
      if (kNeeds & kCrossTerm) {
        add_product(part.cross_t, exp_v, x_s);
      } else if (kHasDot<kNeeds>) {
        // Exactly 0 for equal logits, finite for masked ones. A common slope is applied to the sum.
        if (kNeeds & kLogRatio) add_product(part.dot_s, exp_u, (t[i] - difference.origin_t) - x_s);
        else if (kNeeds & kOwnSlopes) add_product(part.dot_t, exp_v, x_t * teacher.slope - x_s * student.slope);
        else add_product(part.dot_t, exp_v, x_t - x_s);
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
    int i = 0;
    each_sum<kNeeds>(part, [&](float& sum) { values[i++] = sum; });
    i = 0;
    each_sum<kNeeds>(sums, [&](float& sum) { sum += values[i++]; });
  });
}

// The squares of a constant row may be below 0 by rounding. Propagates NaN.
FASTKD_DEVICE float deviation_of(float squares, int classes) {
  return squares < 0 ? 0.0f : sqrtf(squares / float(classes - 1));
}

// Of a member's logits of one model, relative to the first of them: that one has the row's mean within a few
// deviations, so that the difference of the squares loses little.
struct Moments {
  float first, sum, squares;

  FASTKD_DEVICE void add(float z) {
    const float above = z - first;
    sum += above;
    squares = fused(above, above, squares);
  }

  // Makes them the sum and the sum of squares of the deviations from `mean`.
  FASTKD_DEVICE void relate_to(float mean, float count) {
    const float average = count > 0 ? sum * (1.0f / count) : 0.0f, from_mean = (first - mean) + average;
    squares -= sum * average;
    sum = count * from_mean;
    squares += sum * from_mean;
  }
};

// Sets the scales of both models for (z - mean) / (deviation + epsilon) / T; deviation with C - 1.
template <class Type>
FASTKD_DEVICE void standardize(Team& team, const Share<Type>& share, Row<float>& row) {
  const int classes = int(row.classes);
  Moments student{}, teacher{};
  int count = 0;
  share.first_pass([&](int column, const Vector<Type>& s, const Vector<Type>& t) {
    if (count == 0) {
#pragma unroll
      for (int i = kVector - 1; i >= 0; i--)
        if (is_inside(column + i, classes)) student.first = s.z[i], teacher.first = t.z[i];
    }
    each_inside(column, classes, [&](int i) {
      student.add(s.z[i]);
      teacher.add(t.z[i]);
    });
    count += (classes - column < kVector ? classes - column : kVector) + (column < 0 ? column : 0);
  });
  const float number = float(count);
  float sums[] = {fused(number, student.first, student.sum), fused(number, teacher.first, teacher.sum)};
  team.all_reduce(sums, Sum());
  // Two steps: these sums are inexact for logits far from 0, so the deviations from them correct the means.
  row.student.mean = sums[0] / float(classes);
  row.teacher.mean = sums[1] / float(classes);
  student.relate_to(row.student.mean, number);
  teacher.relate_to(row.teacher.mean, number);
  float deviations[] = {student.sum, teacher.sum, student.squares, teacher.squares};
  team.all_reduce(deviations, Sum());
  row.student.mean_rest = deviations[0] / float(classes);
  row.teacher.mean_rest = deviations[1] / float(classes);
  row.student.deviation = deviation_of(deviations[2] - deviations[0] * row.student.mean_rest, classes);
  row.teacher.deviation = deviation_of(deviations[3] - deviations[1] * row.teacher.mean_rest, classes);
  row.student.slope /= row.student.deviation + kStandardizeEpsilon;
  row.teacher.slope /= row.teacher.deviation + kStandardizeEpsilon;
}

// Writes a vector of the gradient; of the label, if it is there, `label_value`.
template <class Type>
FASTKD_DEVICE void write_vector(const RowPointer<Type>& gradient, int column, int classes, float constant, int label,
                                float label_value, float (&values)[kVector]) {
  const bool has_label = is_inside(label - column, kVector);
  if (!has_label & (constant == 0) & gradient.is_whole(column)) return store_whole_vector(gradient, column, values);
#pragma unroll
  for (int i = 0; i < kVector; i++) values[i] = column + i == label ? label_value : values[i] + constant;
  store_vector(gradient, column, classes, values);
}

template <unsigned kNeeds, class Type, bool kTeacher>
FASTKD_DEVICE void write_gradient(const Share<Type, kTeacher>& share, const RowPointer<Type>& gradient, int label,
                                  const Row<float>& row, SoftmaxGradient<float> g) {
  const float power_s = row.student.slope * kLog2E, power_t = row.teacher.slope * kLog2E;
  // The exponentials of a model without unmasked classes are all 1. Elsewhere masked logits need not be clamped.
  constexpr bool kClamps = (kNeeds & kStandardized) != 0;
  const float masked = kNeeds & kOwnSlopes ? masked_value(row) : kMasked;
  if (!kClamps && row.sums.max_s == masked) {
    g.constant += g.student + g.student_t1;
    g.student = g.student_t1 = 0;
  }
  if (!kClamps && row.sums.max_t == masked) {
    g.constant -= g.teacher;
    g.teacher = 0;
  }
  // student e^u - teacher e^v = scale (ratio e^u - e^v): exactly 0 for equal terms. A teacher of 0 is one without
  // exponentials.
  const bool drops_teacher = !(fabsf(g.teacher) > 0x1p-60f * fabsf(g.student)) && g.teacher == g.teacher;
  const float scale = drops_teacher ? g.student : g.teacher;
  const float ratio = drops_teacher ? 1.0f : rounded_quotient(g.student, g.teacher);
  const float max_s = row.sums.max_s, max_t = drops_teacher ? INFINITY : row.sums.max_t;
  const int classes = int(row.classes);
  share.template next_pass<kClamps>([&](int column, const auto& student, const auto& teacher) {
    float values[kVector];
#pragma unroll
    for (int i = 0; i < kVector; i++) {
      const float above_s = student.z[i] - max_s;
      const float exp_u = power_of_two(above_s * power_s);
      values[i] = scale * exp_u;
      if (kTeacher) values[i] = scale * fused(ratio, exp_u, -power_of_two((teacher.z[i] - max_t) * power_t));
      if (kNeeds & kStudentAtT1) values[i] = fused(g.student_t1, power_of_two(above_s * kLog2E), values[i]);
      if (kNeeds & kStandardized) values[i] = fused(g.affine, above_mean(student.z[i], row.student), values[i]);
    }
    write_vector(gradient, column, classes, g.constant, label, g.label, values);
  });
}

// The gradient of reverse KL, (q_i / T) (mean - d_i) / T of the differences d of the logits. The mean is subtracted
// before the product: of a student with one probability it is that class's difference exactly.
template <class Type>
FASTKD_DEVICE void write_log_ratio_gradient(const Share<Type>& share, const RowPointer<Type>& gradient,
                                            const Row<float>& row, const Difference& difference, float log_ratio) {
  const float power = row.student.slope * kLog2E, factor = log_ratio * row.student.slope, max_s = row.sums.max_s;
  // Of the logits themselves if the origins are close, which is exact near equality; else relative to the origins.
  const float origins = difference.origin_t - max_s;
  const bool near = fabsf(origins * row.student.slope) < 1.0f;
  const float origin_s = near ? 0.0f : max_s, origin_t = near ? 0.0f : difference.origin_t;
  const float mean = near ? difference.mean + origins : difference.mean;
  const int classes = int(row.classes);
  share.next_pass([&](int column, const Vector<Type>& student, const Vector<Type>& teacher) {
    float values[kVector];
#pragma unroll
    for (int i = 0; i < kVector; i++) {
      const float exp_u = power_of_two((student.z[i] - max_s) * power);
      values[i] = exp_u * (factor * (((teacher.z[i] - origin_t) - (student.z[i] - origin_s)) - mean));
    }
    write_vector(gradient, column, classes, 0.0f, -1, 0.0f, values);
  });
}

template <class Loss, unsigned kNeeds, class Type>
FASTKD_KERNEL((kNeeds & kStandardized) ? k128Registers : kRegisters<Type>)
softmax_rows(FASTKD_PARAMETER RowLossArguments arguments) {
  const Rows& rows = arguments.pairs[block_y()];
  Team team(arguments.plan);
  const int64_t index = team.row();
  const unsigned needs = arguments.options.needs;
  const bool labelled = (needs & kLabelled) && rows.target != nullptr;
  const RowInfo info = row_info(rows, index, labelled);
  const int label = info.label;
  const auto share = share_of<Type, (kNeeds & kDistills) != 0>(team, arguments, rows, index, info.kind);
  const bool with_logit_sum = (needs & kLabelSmoothing) != 0;
  uint32_t label_s = 0, label_t = 0, origin = 0;
  if (label >= 0) {
    if (with_logit_sum) origin = load_logit(share.student(), 0);
    label_s = load_logit(share.student(), label);
    if (kNeeds & kDistills) label_t = load_logit(row_of<Type>(rows.teacher, index), label);
  }

  Row<float> row{};
  row.classes = rows.classes;
  slopes_of(options_of(arguments), row.student.slope, row.teacher.slope);
  const Type type = share.student().type;
  row.origin = value_of(origin, type);
  Difference difference{kMasked, 0.0f};
  if constexpr (kNeeds & kStandardized) {
    standardize(team, share, row);
    sum_share<kNeeds, Type>([&](const auto& visit) { share.next_pass(visit); }, label, with_logit_sum, row, difference);
  } else {
    sum_share<kNeeds, Type>([&](const auto& visit) { share.first_pass(visit); }, label, with_logit_sum, row,
                            difference);
  }
  combine_statistics<kNeeds>(team, row, difference);
  team.arrive_before_exit();

  if (info.kind != RowKind::kComputed) {
    write_uncomputed<Type>(team, rows, index, info.kind);
  } else {
    row.label = {label >= 0, value_of(label_s, type),
                 value_of(label_t, Type(kNeeds & kDistills ? rows.teacher.dtype : rows.student.dtype))};
    SoftmaxResult<float> result = formula_of<Loss>(options_of(arguments), row);
    const float weight = info.weight;
    for (float& term : result.terms) term *= weight;
    write_losses(team, rows, index, weight * result.loss, result.terms);
    if (rows.gradient.data != nullptr) {
      SoftmaxGradient<float> g = result.gradient;
      if (!(kNeeds & kStudentAtT1)) g.student += g.student_t1;
      g.student *= weight, g.teacher *= weight, g.student_t1 *= weight, g.constant *= weight;
      g.affine *= weight, g.log_ratio *= weight, g.label *= weight;
      const RowPointer<Type> gradient = gradient_row(rows, index, share);
      if constexpr (kNeeds & kLogRatio) write_log_ratio_gradient(share, gradient, row, difference, g.log_ratio);
      else write_gradient<kNeeds>(share, gradient, label, row, g);
    }
  }
  team.wait_before_exit();
}

}  // namespace cuda
}  // namespace fastkd

// The row skeleton of the softmax family: statistics in one pass, the row formula, the gradient in a second.
#pragma once

#include "prologue_epilogue.h"
#include "scalar_math.h"

namespace fastkd {
namespace cuda {

// Calls visit on every sum that kNeeds asks for.
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
  team.all(bases, Max());
  rebase<kNeeds>(row.sums, bases[0], bases[1], row.student.slope, row.teacher.slope);
  float values[kSumCount<kNeeds>];
  list_sums<kNeeds>(row.sums, values);
  team.all(values, Sum());
  int i = 0;
  each_sum<kNeeds>(row.sums, [&](float& sum) { sum = values[i++]; });
  if (!(kNeeds & kOwnSlopes)) row.sums.dot_s *= row.teacher.slope, row.sums.dot_t *= row.teacher.slope;
  row.sums.cross_t *= row.student.slope;
  // Where these are not taken, T is 1.
  if (!(kNeeds & kStudentAtT1)) row.sums.t1_s = row.sums.sum_s;
  if (!(kNeeds & kTeacherAtT1)) row.sums.t1_t = row.sums.sum_t;
}

FASTKD_DEVICE float largest_of(const float (&z)[kVector], float bound) {
  Max larger;
  const float low = larger(larger(z[0], z[1]), larger(z[2], z[3])),
              high = larger(larger(z[4], z[5]), larger(z[6], z[7]));
  return larger(larger(low, high), bound);
}

// A member's sums over its share, which `pass` walks; the label, -1 for none, is left out.
template <unsigned kNeeds, class Pass>
FASTKD_DEVICE void sum_share(const Pass& pass, int label, bool with_logit_sum, Row<float>& row) {
  SoftmaxStatistics<float>& sums = row.sums;
  sums.max_s = sums.max_t = kMasked;
  const RowScale<float> student = row.student, teacher = row.teacher;
  const float masked = kNeeds & kOwnSlopes ? masked_value(row) : kMasked;
  const float power_s = student.slope * kLog2E, power_t = teacher.slope * kLog2E;
  const float headroom_s = headroom(kNeeds & kStudentAtT1, student.slope);
  const float headroom_t = headroom(kNeeds & kTeacherAtT1, teacher.slope);
  const int classes = int(row.classes);

  pass([&](int column, float (&s)[kVector], float (&t)[kVector]) {
    if (with_logit_sum) {
      float sum = 0;
      for (int i = 0; i < kVector; i++) sum += is_inside(column + i, classes) ? s[i] - row.origin : 0.0f;
      sums.logit_sum += sum;
    }
    if (is_inside(label - column, kVector)) {
      for (int i = 0; i < kVector; i++)
        if (column + i == label) s[i] = t[i] = masked;
    }
    if (kNeeds & kOwnSlopes) {
#pragma unroll
      for (int i = 0; i < kVector; i++) {
        s[i] = s[i] < masked ? masked : s[i];
        t[i] = t[i] < masked ? masked : t[i];
      }
    }
    const float top_s = largest_of(s, sums.max_s), top_t = largest_of(t, sums.max_t);
    if (top_s > sums.max_s + headroom_s || top_t > sums.max_t + headroom_t)
      rebase<kNeeds>(sums, top_s, top_t, student.slope, teacher.slope);
    SoftmaxStatistics<float> part{};  // the vector's own sums: adding up eight first loses less in rounding
#pragma unroll
    for (int i = 0; i < kVector; i++) {
      // The differences below are of the very numbers that the exponentials are taken of: what rounding does to them
      // then moves the divergence only as a change of the logits would.
      const float x_s = s[i] - sums.max_s, x_t = t[i] - sums.max_t;
      const float exp_u = power_of_two(x_s * power_s), exp_v = power_of_two(x_t * power_t);
      part.sum_s += exp_u;
      part.sum_t += exp_v;
      if (kNeeds & kCrossTerm) {
        part.cross_t = fused(exp_v, x_s, part.cross_t);
      } else if (!(kNeeds & kSumsOnly)) {
        // Equal logits differ by exactly 0, and masked ones by a number. A common slope follows after the sum.
        const float difference = kNeeds & kOwnSlopes ? x_t * teacher.slope - x_s * student.slope : x_t - x_s;
        if (kNeeds & kLogRatio) part.dot_s = fused(exp_u, difference, part.dot_s);
        else part.dot_t = fused(exp_v, difference, part.dot_t);
      }
      if (kNeeds & kStandardized) {
        const float above_mean = s[i] - student.mean;
        part.moment_s = fused(exp_u, above_mean, part.moment_s);
        part.moment_t = fused(exp_v, above_mean, part.moment_t);
      }
      if (kNeeds & kStudentAtT1) part.t1_s += power_of_two(x_s * kLog2E);
      if (kNeeds & kTeacherAtT1) part.t1_t += power_of_two(x_t * kLog2E);
    }
    float values[kSumCount<kNeeds>];
    list_sums<kNeeds>(part, values);
    int i = 0;
    each_sum<kNeeds>(sums, [&](float& sum) { sum += values[i++]; });
  });
}

// Rounding may leave the squares of a constant row below 0; a NaN stays.
FASTKD_DEVICE float deviation_of(float squares, int classes) {
  return squares < 0 ? 0.0f : sqrtf(squares / float(classes - 1));
}

// Brings both models' rows to (z - mean) / (deviation + epsilon) / T, the deviation with C - 1.
FASTKD_DEVICE void standardize(Team& team, const Share& share, Row<float>& row) {
  const int classes = int(row.classes);
  float sums[] = {0.0f, 0.0f};
  share.first_pass([&](int column, float (&s)[kVector], float (&t)[kVector]) {
    for (int i = 0; i < kVector; i++) {
      if (!is_inside(column + i, classes)) continue;
      sums[0] += s[i];
      sums[1] += t[i];
    }
  });
  team.all(sums, Sum());
  // Near the means, and how far from them the deviations say: far from 0 the sums themselves lose the spread.
  row.student.mean = sums[0] / float(classes);
  row.teacher.mean = sums[1] / float(classes);
  float deviations[] = {0.0f, 0.0f, 0.0f, 0.0f};  // sums, and sums of squares
  share.next_pass([&](int column, float (&s)[kVector], float (&t)[kVector]) {
    for (int i = 0; i < kVector; i++) {
      if (!is_inside(column + i, classes)) continue;
      const float from_mean_s = s[i] - row.student.mean, from_mean_t = t[i] - row.teacher.mean;
      deviations[0] += from_mean_s;
      deviations[1] += from_mean_t;
      deviations[2] = fused(from_mean_s, from_mean_s, deviations[2]);
      deviations[3] = fused(from_mean_t, from_mean_t, deviations[3]);
    }
  });
  team.all(deviations, Sum());
  row.student.mean_rest = deviations[0] / float(classes);
  row.teacher.mean_rest = deviations[1] / float(classes);
  row.student.deviation = deviation_of(deviations[2] - deviations[0] * row.student.mean_rest, classes);
  row.teacher.deviation = deviation_of(deviations[3] - deviations[1] * row.teacher.mean_rest, classes);
  row.student.slope /= row.student.deviation + kStandardizeEpsilon;
  row.teacher.slope /= row.teacher.deviation + kStandardizeEpsilon;
}

template <unsigned kNeeds>
FASTKD_DEVICE void write_gradient(const Share& share, const RowPointer& gradient, int label, const Row<float>& row,
                                  const SoftmaxGradient<float>& g) {
  const float power_s = row.student.slope * kLog2E, power_t = row.teacher.slope * kLog2E;
  const float max_s = row.sums.max_s, max_t = row.sums.max_t, log_ratio = g.log_ratio * row.student.slope;
  const int classes = int(row.classes);
  // Differences of logits: exact near equality where the bases are near each other, else relative to them.
  const float bases = (max_t - max_s) * row.student.slope;
  const bool near = fabsf(bases) < 1.0f;
  const float origin_s = near ? 0.0f : max_s, origin_t = near ? 0.0f : max_t;
  const float without_ratio = near ? g.student - g.log_ratio * bases : g.student;
  share.next_pass([&](int column, float (&s)[kVector], float (&t)[kVector]) {
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
      values[i] = g.student * exp_u - g.teacher * exp_v + g.constant;  // equal products cancel: no multiply-add
      if (kNeeds & kStudentAtT1) values[i] = fused(g.student_t1, power_of_two(above_s * kLog2E), values[i]);
      if (kNeeds & kStandardized) values[i] = fused(g.affine, above_mean(s[i], row.student), values[i]);
    }
    if (is_inside(label - column, kVector)) {
      for (int i = 0; i < kVector; i++)
        if (column + i == label) values[i] = g.label;
    }
    store_vector(gradient, column, classes, values);
  });
}

template <class Loss, unsigned kNeeds>
FASTKD_KERNEL softmax_rows(FASTKD_PARAMETER RowLossArguments arguments) {
  const Rows& rows = arguments.pairs[block_y()];
  Team team(arguments.plan);
  const int64_t index = team.row();
  const unsigned needs = arguments.options.needs;
  const bool labelled = (needs & kLabelled) && rows.target != nullptr;
  const RowHead head = head_of(rows, index, labelled);
  const int label = head.label;
  const Share share = share_of(team, arguments, rows, index, head.kind);
  const bool with_logit_sum = (needs & kLabelSmoothing) != 0;
  LoadedLogit label_s{}, label_t{}, origin{};
  if (label >= 0) {
    if (with_logit_sum) origin = load_logit(share.student(), 0);
    label_s = load_logit(share.student(), label);
    if (needs & kDistills) label_t = load_logit(share.teacher(), label);
  }

  Row<float> row{};
  row.classes = rows.classes;
  slopes_of(options_of(arguments), row.student.slope, row.teacher.slope);
  row.origin = value_of(origin);
  if (kNeeds & kStandardized) {
    standardize(team, share, row);
    sum_share<kNeeds>([&](const auto& visit) { share.next_pass(visit); }, label, with_logit_sum, row);
  } else {
    sum_share<kNeeds>([&](const auto& visit) { share.first_pass(visit); }, label, with_logit_sum, row);
  }
  combine_statistics<kNeeds>(team, row);
  team.done_exchanging();

  if (head.kind != RowKind::kComputed) {
    write_uncomputed(team, rows, index, head.kind);
  } else {
    row.label = {label >= 0, value_of(label_s), value_of(label_t)};
    SoftmaxResult<float> result = formula_of<Loss>(options_of(arguments), row);
    const float weight = head.weight;
    for (float& term : result.terms) term *= weight;
    write_losses(team, rows, index, weight * result.loss, result.terms);
    if (rows.gradient.data != nullptr) {
      SoftmaxGradient<float> g = result.gradient;
      if (!(kNeeds & kStudentAtT1)) g.student += g.student_t1;
      g.student *= weight, g.teacher *= weight, g.student_t1 *= weight, g.constant *= weight;
      g.affine *= weight, g.log_ratio *= weight, g.label *= weight;
      write_gradient<kNeeds>(share, gradient_row(rows, index, share), label, row, g);
    }
  }
  team.leave();
}

}  // namespace cuda
}  // namespace fastkd

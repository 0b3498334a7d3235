// Mean and deviation of each row of both models, of standardised logits: a pass before that of the statistics.
#pragma once

#include "blocks.h"
#include "row_phases.h"

namespace fastkd {
namespace FASTKD_ISA {

// Chan et al.
FASTKD_INLINE Moments merged(const Moments& a, const Moments& b) {
  const double count = a.count + b.count, step = b.mean - a.mean;
  return {count, a.mean + step * b.count / count, a.squares + b.squares + step * step * a.count * b.count / count};
}

// Of n values relative to `origin`, which should be near their mean.
template <class E>
FASTKD_INLINE Moments moments_around(const typename E::type* from, int n, float origin) {
  const vf bound = broadcast(kMasked), center = broadcast(origin);
  vf deviations = {}, squares = {}, part_deviations = {}, part_squares = {};
  const auto add = [&](vf x) __attribute__((always_inline)) {
    const vf deviation = at_least(x, bound) - center;
    part_deviations += deviation;
    part_squares += deviation * deviation;
  };
  int i = 0;
  while (i + kLanes <= n) {
    for (const int end = end_of_part(i, n - n % kLanes); i < end; i += kLanes) add(E::load(from + i));
    deviations += part_deviations, squares += part_squares;
    part_deviations = part_squares = vf{};
  }
  if (i < n) {
    typename E::type tail[kLanes] = {};
    std::memcpy(tail, from + i, (n - i) * sizeof(tail[0]));
    vf x = at_least(E::load(tail), bound);
    for (int j = n - i; j < kLanes; j++) x[j] = origin;
    add(x);
  }
  const double sum = horizontal_sum(deviations + part_deviations);
  const double around_mean = horizontal_sum(squares + part_squares) - sum * sum / n;
  return {double(n), origin + sum / n, around_mean < 0 ? 0 : around_mean};
}

template <class E>
static Moments moments_of_block(const typename E::type* from, int n, float origin) {
  const Moments moments = moments_around<E>(from, n, origin);
  // Far from the origin, the squares cancel. The mean is close enough then to be the origin of a second attempt.
  const double step = moments.mean - origin;
  if (4 * step * step * n <= moments.squares) return moments;
  return moments_around<E>(from, n, float(moments.mean));
}

static Moments moments_of(const Matrix& logits, int64_t row, int64_t begin, int64_t end) {
  return with_element(logits.dtype, [&](auto element) __attribute__((always_inline)) {
    typedef decltype(element) E;
    // Of the first block the mean of a few logits is near the mean.
    const int few = block_size(end - begin < kLine ? end : begin + kLine, begin);
    float first[kLine];
    load_block(logits, row, begin, few, first);
    Moments total{0, double(sum_of_block(first, few)) / few, 0};
    for (int64_t offset = begin; offset < end; offset += kBlock) {
      const int n = block_size(end, offset);
      total = merged(total, moments_of_block<E>(element_at<E>(logits, row, offset), n, float(total.mean)));
    }
    return total;
  });
}

static RowScale<double> standardizing_scale(const Moments& moments, double temperature) {
  const double deviation = __builtin_sqrt(moments.squares / (moments.count - 1));
  return {1.0 / ((deviation + kStandardizeEpsilon) * temperature), moments.mean, 0, deviation};
}

static void moments_pass(const RowJob& job, int64_t begin, int64_t end, RowPart& part) {
  part.student = moments_of(job.rows->student, job.index, begin, end);
  part.teacher = moments_of(job.rows->teacher, job.index, begin, end);
}

static void combine_moments(RowJob& job, const RowPart* parts, int count) {
  Moments student{}, teacher{};
  for (int i = 0; i < count; i++)
    student = merged(student, parts[i].student), teacher = merged(teacher, parts[i].teacher);
  job.row.student = standardizing_scale(student, job.options->values[0]);
  job.row.teacher = standardizing_scale(teacher, job.options->values[0]);
}

}  // namespace FASTKD_ISA
}  // namespace fastkd

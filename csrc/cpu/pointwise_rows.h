// The row skeleton of the pointwise family: sums over classes of a function of two logits. One pass, no statistics.
#pragma once

#include "blocks.h"
#include "row_phases.h"

namespace fastkd {
namespace FASTKD_ISA {

constexpr int kFactors = 64;  // each in [1/2, 1]: their product is a normal float

// Returns the sum over n classes. `logits(i, s, t)` loads vectors of logits, `store_slope(i, slope)` takes the
// derivatives.
template <class Loss, class Logits, class Store>
FASTKD_INLINE double sum_pointwise(int n, float inverse, const Logits& logits, const Store& store_slope) {
  double total = 0;
  for (int begin = 0; begin < n; begin += kFactors * kLanes) {
    const int end = n - begin < kFactors * kLanes ? n : begin + kFactors * kLanes;
    vf sum = {}, product = broadcast(1.0f);
    for (int i = begin; i < end; i += kLanes) {
      vf s, t;
      logits(i, s, t);
      const ClassTerm<vf> term = Loss::template formula<VectorMath>(s, t, inverse);
      sum += term.value;
      if (Loss::kHasFactor) product *= term.factor;
      store_slope(i, term.slope);
    }
    if (Loss::kHasFactor) sum += natural_log(product);
    total += horizontal_sum(sum);
  }
  return total;
}

// Processes the whole vectors of a block without a buffer, for models of the same dtype. Returns the number of logits
// done.
template <class Loss, class E>
static int pass_over_vectors(const RowJob& job, int64_t offset, int n, float inverse, float slope_weight,
                             double& total) {
  const Rows& rows = *job.rows;
  const typename E::type* from_s = element_at<E>(rows.student, job.index, offset);
  const typename E::type* from_t = element_at<E>(rows.teacher, job.index, offset);
  const bool with_gradient = rows.gradient.data != nullptr;
  typename E::type* to = with_gradient ? element_at<E>(rows.gradient, job.index, offset) : nullptr;
  const Prefetch next_s = prefetch_next_block(rows.student, rows, job.index, offset);
  const Prefetch next_t = prefetch_next_block(rows.teacher, rows, job.index, offset);
  const Prefetch next_gradient = prefetch_next_block(rows.gradient, rows, job.index, offset);
  const vf masked = broadcast(kMasked);
  const int whole = n - n % kLanes;
  total += sum_pointwise<Loss>(
      whole, inverse,
      [&](int i, vf& s, vf& t) __attribute__((always_inline)) {
        if (starts_cache_line<E>(i)) {
          prefetch(next_s, i);
          prefetch(next_t, i);
          if (with_gradient) prefetch_for_write(next_gradient, i);
        }
        s = at_least(E::load(from_s + i), masked), t = at_least(E::load(from_t + i), masked);
      },
      [&](int i, vf slope) __attribute__((always_inline)) {
        if (!with_gradient) return;
        E::store(to + i, slope * slope_weight);
      });
  return whole;
}

template <class Loss>
static int pass_over_vectors(const RowJob& job, int64_t offset, int n, float inverse, float slope_weight,
                             double& total) {
  if (job.rows->student.dtype != job.rows->teacher.dtype) return 0;
  return with_element(job.rows->student.dtype, [&](auto element) __attribute__((always_inline)) {
    return pass_over_vectors<Loss, decltype(element)>(job, offset, n, inverse, slope_weight, total);
  });
}

template <class Loss>
static void pointwise_pass(const RowJob& job, int64_t begin, int64_t end, RowPart& part) {
  const Rows& rows = *job.rows;
  const float temperature = job.options->values[0];
  const float weight = weight_of(rows, job.index), inverse = 1.0f / temperature;
  const float slope_weight = weight * temperature;  // d loss / d z = T^2 f'(u) / T
  const bool with_gradient = rows.gradient.data != nullptr;
  float z_s[kBlock], z_t[kBlock];
  for (int64_t offset = begin; offset < end; offset += kBlock) {
    int n = block_size(end, offset);
    const int done = pass_over_vectors<Loss>(job, offset, n, inverse, slope_weight, part.value_sum);
    if (done == n) continue;
    // The ragged end of the row, or models of different dtypes.
    n -= done;
    const int64_t rest = offset + done;
    const int padded = load_block(rows.student, job.index, rest, n, z_s);
    load_block(rows.teacher, job.index, rest, n, z_t);
    part.value_sum += sum_pointwise<Loss>(
        padded, inverse,
        [&](int i, vf& s, vf& t) __attribute__((always_inline)) { s = load(z_s + i), t = load(z_t + i); },
        [&](int i, vf slope) __attribute__((always_inline)) { store(z_s + i, slope * slope_weight); });
    if (with_gradient)
      store_block(rows.gradient, job.index, rest, n,
                  [&](int i) __attribute__((always_inline)) { return load(z_s + i); });
  }
}

static void combine_pointwise(RowJob& job, const RowPart* parts, int count) {
  const double temperature = job.options->values[0];
  double total = 0;
  for (int i = 0; i < count; i++) total += parts[i].value_sum;
  write_loss(job, temperature * temperature * total);
}

template <class Loss>
static const Phases* phases_for(unsigned, PointwiseFamily) {
  static constexpr Phases phases = {1,
                                    false,
                                    {pointwise_pass<Loss>, nullptr, nullptr},
                                    {combine_pointwise, nullptr, nullptr}};
  return &phases;
}

// gradient[row] *= grad_output[row], in place; a row whose factor is 1 is not accessed.
static void scale_rows(const Matrix& gradient, const float* grad_output, int64_t grad_output_stride, int64_t classes,
                       int64_t begin, int64_t end) {
  float block[kBlock];
  for (int64_t row = begin; row < end; row++) {
    const float factor = grad_output[row * grad_output_stride];
    if (factor == 1.0f) continue;
    for (int64_t offset = 0; offset < classes; offset += kBlock) {
      const int n = block_size(classes, offset);
      load_block(gradient, row, offset, n, block, -__builtin_inff());
      store_block(gradient, row, offset, n,
                  [&](int i) __attribute__((always_inline)) { return load(block + i) * factor; });
    }
  }
}

}  // namespace FASTKD_ISA
}  // namespace fastkd

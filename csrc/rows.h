// The rows of a call, as kernels receive them.
#pragma once

#include <cstdint>

#include "row_math.h"

namespace fastkd {

enum class DType : int32_t { kLong = 4, kHalf = 5, kFloat = 6, kBFloat16 = 15 };  // torch's ScalarType

// N rows with dense classes: [N, C], or [M, K, C] with N = M * K.
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;         // elements from row to row
  int64_t inner = INT64_MAX;  // K, or at least N for [N, C]
  int64_t outer_stride = 0;   // elements from one group of `inner` rows to the next
  DType dtype = DType::kFloat;
};

// Offset of a row in elements.
FASTKD_ROW_FUNCTION int64_t row_offset(const Matrix& matrix, int64_t row) {
  if (row < matrix.inner) return row * matrix.stride;  // spares the division
  return row / matrix.inner * matrix.outer_stride + row % matrix.inner * matrix.stride;
}

// The rows of one call. Pointers that may be null: target, row_weight, terms, gradient.data.
struct Rows {
  Matrix student, teacher, gradient;
  int64_t count, classes;
  const int64_t* target;
  int64_t target_stride;
  const float* row_weight;
  int64_t row_weight_stride;
  float scale;
  float* losses;
  float* terms;  // kTerms values per row, `term_stride` apart
  int64_t term_stride;
};

// The classes at which a teacher is known. Its logits have K + 1 classes: these, and all others as one.
struct Known {
  const int64_t* indices;  // K per row, in ascending order
  int64_t stride, count;
  uint32_t needs;          // of the loss over K + 1 classes
};

// The first of the ascending known[low] to known[high - 1] that is not below `least`; `high` if all are.
template <class Int>
FASTKD_ROW_FUNCTION Int first_known(const int64_t* known, Int low, Int high, int64_t least) {
  while (low < high) {
    const Int middle = (low + high) / 2;
    if (known[middle] < least) low = middle + 1;
    else high = middle;
  }
  return low;
}

FASTKD_ROW_FUNCTION float weight_of(const Rows& rows, int64_t row) {
  return rows.row_weight == nullptr ? rows.scale : rows.scale * rows.row_weight[row * rows.row_weight_stride];
}

}  // namespace fastkd

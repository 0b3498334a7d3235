// What the instruction sets implement and the dispatcher chooses from.
#pragma once

#include <cstdint>

#include "../row_formulas.h"

namespace fastkd {

enum class DType : int32_t { kLong = 4, kHalf = 5, kFloat = 6, kBFloat16 = 15 };  // torch's ScalarType

// Dense rows in one or two leading dimensions: rows of [N, C], or of [M, K, C], where N = M * K.
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;         // elements from row to row
  int64_t inner = INT64_MAX;  // rows that `stride` reaches: K, or at least N where there is one leading dimension
  int64_t outer_stride = 0;   // elements from one group of `inner` rows to the next
  DType dtype = DType::kFloat;
};

// Elements from the first row to this one.
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
  float* terms;  // four numbers per row, `term_stride` apart
  int64_t term_stride;
};

FASTKD_ROW_FUNCTION float weight_of(const Rows& rows, int64_t row) {
  return rows.row_weight == nullptr ? rows.scale : rows.scale * rows.row_weight[row * rows.row_weight_stride];
}

// Calls body(begin, end, context) over parts of 0 to count, on several threads.
typedef void (*Parallel)(int64_t count, void (*body)(int64_t begin, int64_t end, void* context), void* context);

struct Kernels {
  const char* name;
  // Whether there is a loss of these options; the others must not be called for one that there is not.
  bool (*computes)(const LossOptions&);
  void (*row_loss)(const Rows&, const LossOptions&, int64_t begin, int64_t end);
  // All rows, each in `parts` parts: for fewer rows than threads.
  void (*row_loss_in_parts)(const Rows&, const LossOptions&, int parts, Parallel);
  void (*scale_rows)(const Matrix&, const float* upstream, int64_t upstream_stride, int64_t classes, int64_t begin,
                     int64_t end);
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

// The fastest set that this processor runs, or the one that the environment's FASTKD_ISA names; throws where that
// names none of them.
const Kernels& kernels();

// Why kernels() would throw; nullptr where it would not.
const char* instruction_set_refusal();

// Scratch of the calling thread, at least `floats` long, 64-byte aligned, kept between calls; nullptr where memory
// is short.
float* scratch(int64_t floats);

}  // namespace fastkd

// What the instruction sets implement and the dispatcher chooses from.
#pragma once

#include <cstdint>

#include "../row_formulas.h"

namespace fastkd {

enum class DType : int32_t { kHalf = 5, kFloat = 6, kBFloat16 = 15 };  // torch's ScalarType

struct Matrix {
  void* data;
  int64_t stride;  // elements from row to row; a row is dense
  DType dtype;
};

// The rows of one call. Pointers that may be null: target, row_weight, terms, gradient.data.
struct Rows {
  Matrix student, teacher, gradient;
  int64_t count, classes;
  const int64_t* target;
  int64_t target_stride;
  const float* row_weight;
  float scale;
  float* losses;
  float* terms;  // [4, count]
};

FASTKD_ROW_FUNCTION float weight_of(const Rows& rows, int64_t row) {
  return rows.row_weight == nullptr ? rows.scale : rows.scale * rows.row_weight[row];
}

// Calls body(begin, end, context) over parts of 0 to count, on several threads.
typedef void (*Parallel)(int64_t count, void (*body)(int64_t begin, int64_t end, void* context), void* context);

struct Kernels {
  const char* name;
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

// The fastest set that this processor runs; FASTKD_ISA=portable|avx2|avx512 takes a lower one.
const Kernels& kernels();

// Scratch of the calling thread, at least `floats` long, 64-byte aligned, kept between calls; nullptr where memory
// is short.
float* scratch(int64_t floats);

}  // namespace fastkd

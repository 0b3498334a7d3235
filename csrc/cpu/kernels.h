// What the instruction sets implement and the dispatcher chooses from.
#pragma once

#include "../row_formulas.h"
#include "../rows.h"

namespace fastkd {

// Calls body(begin, end, context) over parts of 0 to count, on several threads.
typedef void (*Parallel)(int64_t count, void (*body)(int64_t begin, int64_t end, void* context), void* context);

struct Kernels {
  const char* name;
  // Whether there is a loss of these options; the others must not be called for one that there is not.
  bool (*computes)(const LossOptions&);
  void (*row_loss)(const Rows&, const LossOptions&, int64_t begin, int64_t end);
  // All rows, each in `parts` parts: for fewer rows than threads.
  void (*row_loss_in_parts)(const Rows&, const LossOptions&, int parts, Parallel);
  void (*scale_rows)(const Matrix&, const float* grad_output, int64_t grad_output_stride, int64_t classes,
                     int64_t begin, int64_t end);
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

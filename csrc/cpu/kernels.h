// The interface of the kernels of each instruction set.
#pragma once

#include "../row_formulas.h"
#include "../rows.h"

namespace fastkd {

// Calls body(begin, end, context) on subranges of [0, count), on several threads.
typedef void (*Parallel)(int64_t count, void (*body)(int64_t begin, int64_t end, void* context), void* context);

struct Kernels {
  const char* name;
  // Whether there is a kernel for these options; a precondition of row_loss and row_loss_in_parts.
  bool (*computes)(const LossOptions&);
  void (*row_loss)(const Rows&, const LossOptions&, int64_t begin, int64_t end);
  // All rows, each split into `parts` parts: for fewer rows than threads.
  void (*row_loss_in_parts)(const Rows&, const LossOptions&, int parts, Parallel);
  // The same for a teacher known at some classes, whose logits are [N, K + 1].
  void (*top_k_loss)(const Rows&, const Known&, const LossOptions&, int64_t begin, int64_t end);
  bool (*top_k_ready)(const int64_t* indices, const float* log_probs, const int64_t* labels, int64_t rows,
                      int64_t count, int64_t classes, float most);
  void (*scale_rows)(const Matrix&, const float* grad_output, int64_t grad_output_stride, int64_t classes,
                     int64_t begin, int64_t end);
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

// Whether the processor converts to bfloat16 by AVX-512 BF16, which older compilers do not know.
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define FASTKD_KNOWS_AVX512_BF16
extern const bool converts_to_bfloat16;
#endif

// The fastest set that this processor supports, or the one named by FASTKD_ISA; throws if that is not supported.
const Kernels& kernels();

// Why kernels() would throw; nullptr if it would not.
const char* instruction_set_refusal();

// Thread-local buffers of at least `floats` floats, 64-byte aligned, retained between calls; nullptr if out of memory.
// Each user has its own.
enum Scratch { kRowScratch, kTopKScratch, kScratchUsers };
float* scratch(Scratch user, int64_t floats);

}  // namespace fastkd

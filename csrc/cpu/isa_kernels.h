// The kernel table of one instruction set. Included once by each isa_*.cpp, which sets FASTKD_ISA.
#pragma once

#include "mixture_rows.h"
#include "pointwise_rows.h"
#include "softmax_rows.h"

#define FASTKD_QUOTE_(name) #name
#define FASTKD_QUOTE(name) FASTKD_QUOTE_(name)
#define FASTKD_JOIN_(a, b) a##b
#define FASTKD_JOIN(a, b) FASTKD_JOIN_(a, b)

namespace fastkd {
namespace FASTKD_ISA {

static RowFunction row_function_for(const LossOptions& options) {
  switch (options.loss) {
    case Loss::kJSD: return jsd_row;
    case Loss::kBinaryKL: return pointwise_row<Loss::kBinaryKL>;
    case Loss::kBinaryKLNorm: return pointwise_row<Loss::kBinaryKLNorm>;
    default: return softmax_row_for(options);
  }
}

static void row_loss(const Rows& rows, const LossOptions& options, int64_t begin, int64_t end) {
  const RowFunction compute = row_function_for(options);
  for (int64_t index = begin; index < end; index++) {
    if (weight_of(rows, index) == 0) write_whole_row(rows, index, 0.0f);  // left out, and not read
    else compute(rows, options, index);
  }
}

}  // namespace FASTKD_ISA

extern const Kernels FASTKD_JOIN(FASTKD_ISA, _kernels) = {FASTKD_QUOTE(FASTKD_ISA), FASTKD_ISA::row_loss,
                                                          FASTKD_ISA::scale_rows};
}  // namespace fastkd

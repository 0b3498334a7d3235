// The kernel table of one instruction set. Included once by each isa_*.cpp, which sets FASTKD_ISA.
#pragma once

#include "pointwise_rows.h"
#include "softmax_rows.h"

#define FASTKD_QUOTE_(name) #name
#define FASTKD_QUOTE(name) FASTKD_QUOTE_(name)
#define FASTKD_JOIN_(a, b) a##b
#define FASTKD_JOIN(a, b) FASTKD_JOIN_(a, b)

namespace fastkd {
extern const Kernels FASTKD_JOIN(FASTKD_ISA, _kernels) = {FASTKD_QUOTE(FASTKD_ISA), FASTKD_ISA::softmax_rows,
                                                          FASTKD_ISA::pointwise_rows, FASTKD_ISA::scale_rows};
}  // namespace fastkd

// The kernels of one instruction set. Included by each isa_*.cpp, which defines FASTKD_ISA.
#pragma once

#include "row_kernels.h"
#include "top_k_rows.h"

#define FASTKD_QUOTE_(name) #name
#define FASTKD_QUOTE(name) FASTKD_QUOTE_(name)
#define FASTKD_JOIN_(a, b) a##b
#define FASTKD_JOIN(a, b) FASTKD_JOIN_(a, b)

namespace fastkd {
extern const Kernels FASTKD_JOIN(FASTKD_ISA, _kernels) = {FASTKD_QUOTE(FASTKD_ISA), FASTKD_ISA::computes,
                                                          FASTKD_ISA::row_loss, FASTKD_ISA::row_loss_in_parts,
                                                          FASTKD_ISA::top_k_loss, FASTKD_ISA::top_k_ready,
                                                          FASTKD_ISA::scale_rows};
}  // namespace fastkd

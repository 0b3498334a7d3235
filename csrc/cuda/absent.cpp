// Linked instead of launch.cu if no CUDA compiler was found, or it failed; setup.py defines the reason.
#include <stdexcept>
#include <string>

#include "launch.h"

#ifndef FASTKD_CUDA_ABSENT
#define FASTKD_CUDA_ABSENT "it was built without CUDA"
#endif

namespace fastkd {
namespace cuda {

[[noreturn]] static void refuse() { throw std::runtime_error(std::string("fastkd_native: ") + FASTKD_CUDA_ABSENT); }

void launch_row_loss(const Rows*, int, const LossOptions&, const DynamicOptions&, const TeamPlan&, const Stream&) {
  refuse();
}
void launch_top_k_loss(const Rows&, const Known&, const LossOptions&, const DynamicOptions&, int64_t*, const TeamPlan&,
                       const TeamPlan&, const Stream&) {
  refuse();
}
void launch_scale_rows(const Matrix&, const float*, int64_t, int64_t, int64_t, const TeamPlan&, const Stream&) {
  refuse();
}
const char* missing(int32_t) { return FASTKD_CUDA_ABSENT; }
const char* absent() { return FASTKD_CUDA_ABSENT; }

}  // namespace cuda
}  // namespace fastkd

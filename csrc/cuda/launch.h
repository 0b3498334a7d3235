// The interface for the operators. Implemented by launch.cu, or by absent.cpp in a build without CUDA.
#pragma once

#include "arguments.h"

namespace fastkd {
namespace cuda {

// A cudaStream_t and its device, which need not be current. The launch functions only enqueue kernels, so that a CUDA
// graph can capture them, and throw std::runtime_error if the launch is invalid or fails.
struct Stream {
  void* handle;
  int32_t device;
};

// Computes 1 to kMaxPairs pairs of equal rows, classes and dtypes. `options` select the kernel, which reads values from
// `dynamic` if given.
void launch_row_loss(const Rows* pairs, int count, const LossOptions& options, const DynamicOptions& dynamic,
                     const TeamPlan& plan, const Stream&);

// The loss of a teacher known at K classes. `workspace` has workspace_words() elements; `plan_at_k` is for the rows of
// K + 1 classes.
void launch_top_k_loss(const Rows& rows, const Known& known, const LossOptions& options, const DynamicOptions& dynamic,
                       int64_t* workspace, const TeamPlan& plan, const TeamPlan& plan_at_k, const Stream&);

// gradient[row] *= grad_output[row] in place.
void launch_scale_rows(const Matrix& gradient, const float* grad_output, int64_t grad_output_stride, int64_t count,
                       int64_t classes, const TeamPlan& plan, const Stream&);

// Why the kernels cannot run on this device, or nullptr. Valid until the next call.
const char* missing(int32_t device);

// Why this build has no kernels, or nullptr.
const char* absent();

}  // namespace cuda
}  // namespace fastkd

// What the operators call. Implemented by launch.cu, or by absent.cpp in a build without CUDA.
#pragma once

#include "arguments.h"

namespace fastkd {
namespace cuda {

// A cudaStream_t; its device need not be current. Both calls only put a kernel into the stream, so that a CUDA graph
// can capture them, and throw std::runtime_error with what the launch was refused for.
struct Stream {
  void* handle;
  int32_t device;
};

// The pairs, 1 to kMostPairs, have equal rows, classes and dtypes. `options` choose the kernel, which reads their
// values from `dynamic` where that is given.
void launch_row_loss(const Rows* pairs, int count, const LossOptions& options, const DynamicOptions& dynamic,
                     const TeamPlan& plan, const Stream&);

// gradient[row] *= grad_output[row] in place.
void launch_scale_rows(const Matrix& gradient, const float* grad_output, int64_t grad_output_stride, int64_t count,
                       int64_t classes, const TeamPlan& plan, const Stream&);

// Why no kernel can run on this device; nullptr where one can. Valid until the next call.
const char* missing(int32_t device);

// Why this build has no kernels, whatever the device; nullptr where it has.
const char* absent();

}  // namespace cuda
}  // namespace fastkd

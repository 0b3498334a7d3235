#include "launch.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "kernel_table.h"

namespace fastkd {
namespace cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it
  throw std::runtime_error(std::string("fastkd_native: ") + what + ": " + cudaGetErrorString(error));
}

// Makes a device current, and restores the previous one on destruction.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&before_), "cannot get the current device");
    if (device == before_) return;
    check(cudaSetDevice(device), "cannot set the device");
    changed_ = true;
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Raises a limit of a kernel, once per device, above the `allowed` of every kernel; `failure` is for the error.
void raise_limit(cudaFuncAttribute limit, int64_t allowed, int64_t value, const void* kernel, int device,
                 const char* failure) {
  if (value <= allowed) return;
  static std::mutex mutex;
  static std::map<std::tuple<cudaFuncAttribute, const void*, int>, int64_t> raised;
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t& before = raised[{limit, kernel, device}];
  if (value <= before) return;
  check(cudaFuncSetAttribute(kernel, limit, int(value)), failure);
  before = value;
}

template <class Arguments>
void launch(void (*kernel)(Arguments), const Arguments& arguments, const Grid& grid, const Stream& stream) {
  const CurrentDevice current(stream.device);
  const void* function = reinterpret_cast<const void*>(kernel);
  raise_limit(cudaFuncAttributeMaxDynamicSharedMemorySize, 48 * 1024, grid.shared_bytes, function, stream.device,
              "cannot set the shared memory size");
  const int beyond_portable = grid.cluster > kPortableBlocks;
  raise_limit(cudaFuncAttributeNonPortableClusterSizeAllowed, 0, beyond_portable, function, stream.device,
              "cannot allow clusters of more than eight blocks");
  if (grid.blocks_x > INT32_MAX) throw std::runtime_error("fastkd_native: too many rows for one launch");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(grid.blocks_x), unsigned(grid.blocks_y));
  config.blockDim = dim3(unsigned(grid.threads));
  config.dynamicSmemBytes = size_t(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(grid.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments), "kernel launch failed");
}

}  // namespace

void launch_row_loss(const Rows* pairs, int count, const LossOptions& options, const DynamicOptions& dynamic,
                     const TeamPlan& plan, const Stream& stream) {
  const char* reason = refusal(pairs, count, plan);
  const RowKernel kernel = reason != nullptr ? nullptr : row_kernel_for(options, pairs[0]);
  if (reason == nullptr && kernel == nullptr) reason = "unknown loss, or no kernel compiled for its needs";
  if (reason != nullptr) throw std::runtime_error(std::string("fastkd_native: ") + reason);
  launch(kernel, arguments_of(pairs, count, options, dynamic, plan), row_loss_grid(pairs, count, plan), stream);
}

void launch_top_k_loss(const Rows& rows, const Known& known, const LossOptions& options, const DynamicOptions& dynamic,
                       int64_t* workspace, const TeamPlan& plan, const TeamPlan& plan_at_k, const Stream& stream) {
  const TopKWorkspace parts = workspace_of(workspace, rows.count, known.count);
  const TopKArguments all{rows, known, options, dynamic, parts, plan};
  const char* reason = each_top_k_launch(all, plan_at_k, [&](auto kernel, const auto& arguments, const Grid& grid) {
    launch(kernel, arguments, grid, stream);
  });
  if (reason != nullptr) throw std::runtime_error(std::string("fastkd_native: ") + reason);
}

void launch_scale_rows(const Matrix& gradient, const float* grad_output, int64_t grad_output_stride, int64_t count,
                       int64_t classes, const TeamPlan& plan, const Stream& stream) {
  if (const char* reason = refusal(classes, plan)) throw std::runtime_error(std::string("fastkd_native: ") + reason);
  const ScaleArguments arguments{gradient, grad_output, grad_output_stride, count, classes, plan};
  launch(scale_kernel_for(gradient.dtype), arguments, scale_grid(count, plan, gradient.dtype), stream);
}

const char* missing(int32_t device) {
  static std::string reason;
  const auto failed = [](cudaError_t error) {
    if (error == cudaSuccess) return false;
    cudaGetLastError();
    reason = std::string("error from the CUDA runtime that it was built with: ") + cudaGetErrorString(error);
    return true;
  };
  int devices = 0;
  if (failed(cudaGetDeviceCount(&devices))) return reason.c_str();
  try {
    const CurrentDevice current(device);
    cudaFuncAttributes attributes;
    // Fails if the library has no code for this device.
    const void* kernel = reinterpret_cast<const void*>(scale_kernel_for(DType::kFloat));
    if (failed(cudaFuncGetAttributes(&attributes, kernel))) return reason.c_str();
  } catch (const std::exception& error) {
    reason = error.what();
    return reason.c_str();
  }
  return nullptr;
}

const char* absent() { return nullptr; }

}  // namespace cuda
}  // namespace fastkd

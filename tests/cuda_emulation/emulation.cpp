// A C interface to the emulated kernels, for ctypes; __init__.py mirrors the structs.
#include "../../csrc/cuda/kernel_table.h"

using namespace fastkd;
using namespace fastkd::cuda;

extern "C" const char* emulated_row_loss(const Rows* pairs, int count, const LossOptions* options, const float* dynamic,
                                         int dynamic_count, const TeamPlan* plan) {
  if (const char* reason = refusal(pairs, count, *plan)) return reason;
  const RowKernel kernel = row_kernel_for(*options, *pairs);
  if (kernel == nullptr) return "unknown loss, or no kernel compiled for its needs";
  const Grid grid = row_loss_grid(pairs, count, *plan);
  return emulation::launch(kernel, arguments_of(pairs, count, *options, {dynamic, dynamic_count}, *plan), grid.blocks_x,
                           grid.blocks_y, grid.threads, grid.cluster, grid.shared_bytes);
}

extern "C" const char* emulated_top_k_loss(const Rows* rows, const Known* known, const LossOptions* options,
                                           const float* dynamic, int dynamic_count, int64_t* workspace,
                                           const TeamPlan* plan, const TeamPlan* plan_at_k) {
  const TopKWorkspace parts = workspace_of(workspace, rows->count, known->count);
  const char* error = nullptr;
  const char* reason = each_top_k_launch({*rows, *known, *options, {dynamic, dynamic_count}, parts, *plan}, *plan_at_k,
                                         [&](auto kernel, const auto& arguments, const Grid& grid) {
                                           if (error != nullptr) return;
                                           error = emulation::launch(kernel, arguments, grid.blocks_x, grid.blocks_y,
                                                                     grid.threads, grid.cluster, grid.shared_bytes);
                                         });
  return reason != nullptr ? reason : error;
}

extern "C" const char* emulated_scale_rows(const Matrix* gradient, const float* grad_output, int64_t grad_output_stride,
                                           int64_t count, int64_t classes, const TeamPlan* plan) {
  if (const char* reason = refusal(classes, *plan)) return reason;
  const Grid grid = scale_grid(count, *plan, gradient->dtype);
  return emulation::launch(scale_kernel_for(gradient->dtype),
                           ScaleArguments{*gradient, grad_output, grad_output_stride, count, classes, *plan},
                           grid.blocks_x, grid.blocks_y, grid.threads, grid.cluster, grid.shared_bytes);
}

extern "C" int64_t shared_bytes(const TeamPlan* plan, int student, int teacher) {
  return grid_of(1, 1, *plan, {DType(student), DType(teacher)}).shared_bytes;
}
extern "C" int64_t words_of_workspace(int64_t rows, int64_t known) { return workspace_words(rows, known); }
extern "C" int64_t size_of_rows() { return sizeof(Rows); }
extern "C" int64_t size_of_options() { return sizeof(LossOptions); }

// Kernel selection, argument checks and launch dimensions, shared by launch.cu and tests/cuda_emulation/.
#pragma once

#include <initializer_list>

#include "mixture_rows.h"
#include "pointwise_rows.h"

namespace fastkd {
namespace cuda {

typedef void (*RowKernel)(RowLossArguments);

// nullptr if the skeleton is not compiled for these needs.
template <class Loss, unsigned... kNeeds>
RowKernel softmax_kernel_for(unsigned needs, VariantList<kNeeds...>) {
  RowKernel found = nullptr;
  (void)(((needs & kCompiledNeeds) == kNeeds && (found = softmax_rows<Loss, kNeeds>, true)) || ...);
  return found;
}

template <class Loss>
RowKernel kernel_for(unsigned needs, SoftmaxFamily) {
  return softmax_kernel_for<Loss>(needs, typename Loss::Variants());
}
template <class Loss>
RowKernel kernel_for(unsigned, MixtureFamily) {
  return mixture_rows<Loss>;
}
template <class Loss>
RowKernel kernel_for(unsigned, PointwiseFamily) {
  return pointwise_rows<Loss>;
}

// nullptr if the loss is unknown, or no kernel is compiled for its needs.
inline RowKernel row_kernel_for(const LossOptions& options) {
  return with_loss<RowKernel>(
      options.loss,
      [&](auto loss) {
        typedef decltype(loss) Loss;
        return kernel_for<Loss>(options.needs, typename Loss::Family());
      },
      Losses());
}

// Why a launch is invalid; nullptr if it is valid.
inline const char* refusal(int64_t classes, const TeamPlan& plan) {
  const auto is_power_of_two = [](int n) { return n > 0 && (n & (n - 1)) == 0; };
  const int threads = plan.threads_per_row * plan.rows_per_block;
  if (!is_power_of_two(plan.threads_per_row) || plan.rows_per_block < 1 || threads > kMaxThreads ||
      threads % kWarp != 0)
    return "threads_per_row must be a power of two, and a block must have whole warps, at most 512 threads";
  if (plan.rows_per_block > 1 && (plan.threads_per_row > kWarp || plan.blocks_per_row > 1))
    return "a block with several rows must have at most a warp per row, and no cluster";
  if (plan.blocks_per_row < 1 || plan.blocks_per_row > kMaxBlocks ||
      (plan.blocks_per_row > 1 && plan.threads_per_row < kWarp))
    return "blocks_per_row must be 1 to 8, with at least a warp per row in each block if there are several";
  if (classes > INT32_MAX - (1 << 20)) return "a row may have at most 2^31 - 2^20 classes";
  const int64_t vectors = (classes + kVector - 2) / kVector + 1, team = plan.threads_per_row * plan.blocks_per_row;
  if (plan.slots < kStages && (vectors + team - 1) / team > plan.slots)
    return "slots must hold all vectors of a thread, or at least 4";
  return nullptr;
}

inline bool is_kernel_dtype(DType dtype) {
  return dtype == DType::kFloat || dtype == DType::kBFloat16 || dtype == DType::kHalf;
}

inline const char* refusal(const Rows* pairs, int count, const TeamPlan& plan) {
  if (count < 1 || count > kMaxPairs) return "a launch takes 1 to 8 pairs of logits";
  for (const Matrix& matrix : {pairs[0].student, pairs[0].teacher, pairs[0].gradient})
    if (!is_kernel_dtype(matrix.dtype)) return "logits and gradients must be float32, bfloat16 or float16";
  for (int i = 1; i < count; i++) {
    if (pairs[i].count != pairs[0].count || pairs[i].classes != pairs[0].classes)
      return "the pairs of a launch must have equal rows and classes";
    if (pairs[i].student.dtype != pairs[0].student.dtype || pairs[i].teacher.dtype != pairs[0].teacher.dtype)
      return "the pairs of a launch must have the same dtypes";
  }
  return refusal(pairs[0].classes, plan);
}

inline RowLossArguments arguments_of(const Rows* pairs, int count, const LossOptions& options,
                                     const DynamicOptions& dynamic, const TeamPlan& plan) {
  RowLossArguments arguments{};
  for (int i = 0; i < count; i++) arguments.pairs[i] = pairs[i];
  arguments.options = options;
  arguments.dynamic = dynamic;
  arguments.plan = plan;
  return arguments;
}

struct Grid {
  int64_t blocks_x;
  int blocks_y, threads, cluster;
  int64_t shared_bytes;
};

// For a kernel that reads logits of these dtypes.
inline Grid grid_of(int64_t rows, int pairs, const TeamPlan& plan, std::initializer_list<DType> dtypes) {
  const int64_t teams = (rows + plan.rows_per_block - 1) / plan.rows_per_block;
  int chunks_per_vector = 0;
  for (DType dtype : dtypes) chunks_per_vector += dtype == DType::kFloat ? 2 : 1;
  return {teams * plan.blocks_per_row, pairs, plan.threads_per_row * plan.rows_per_block, plan.blocks_per_row,
          shared_chunks(plan, chunks_per_vector) * int64_t(sizeof(Chunk))};
}

inline Grid row_loss_grid(const Rows* pairs, int count, const TeamPlan& plan) {
  return grid_of(pairs[0].count, count, plan, {pairs[0].student.dtype, pairs[0].teacher.dtype});
}

// No cluster: the blocks of a row do not communicate.
inline Grid scale_grid(int64_t rows, const TeamPlan& plan, DType gradient) {
  Grid grid = grid_of(rows, 1, plan, {gradient});
  grid.cluster = 1;
  return grid;
}

}  // namespace cuda
}  // namespace fastkd

// Which kernel computes a loss, and with which numbers: the same for a device and for the tests' emulation.
#pragma once

#include <initializer_list>

#include "mixture_rows.h"
#include "pointwise_rows.h"

namespace fastkd {
namespace cuda {

typedef void (*RowKernel)(RowLossArguments);

// nullptr where the skeleton is not compiled for these needs.
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

// nullptr where there is no such loss, or no kernel for what it needs.
inline RowKernel row_kernel_for(const LossOptions& options) {
  return with_loss<RowKernel>(
      options.loss,
      [&](auto loss) {
        typedef decltype(loss) Loss;
        return kernel_for<Loss>(options.needs, typename Loss::Family());
      },
      Losses());
}

// Why the arguments of a launch cannot be right; nullptr where nothing is wrong.
inline const char* refusal(int64_t classes, const TeamPlan& plan) {
  const auto is_power_of_two = [](int n) { return n > 0 && (n & (n - 1)) == 0; };
  const int threads = plan.threads_a_row * plan.rows_a_block;
  if (!is_power_of_two(plan.threads_a_row) || plan.rows_a_block < 1 || threads > kMostThreads || threads % kWarp != 0)
    return "threads_a_row must be a power of two, and the threads of a block whole warps, at most 512 threads";
  if (plan.rows_a_block > 1 && (plan.threads_a_row > kWarp || plan.blocks_a_row > 1))
    return "a block of several rows gives each at most a warp, and shares none with another block";
  if (plan.blocks_a_row < 1 || plan.blocks_a_row > kMostBlocks || (plan.blocks_a_row > 1 && plan.threads_a_row < kWarp))
    return "blocks_a_row must be 1 to 8";
  if (classes > INT32_MAX - (1 << 20)) return "a row may have at most 2^31 - 2^20 classes";
  const int64_t vectors = (classes + kVector - 2) / kVector + 1, team = plan.threads_a_row * plan.blocks_a_row;
  if (plan.slots < kAhead && (vectors + team - 1) / team > plan.slots)
    return "slots must hold all vectors of a thread, or at least 4 of them";
  return nullptr;
}

inline bool is_kernel_dtype(DType dtype) {
  return dtype == DType::kFloat || dtype == DType::kBFloat16 || dtype == DType::kHalf;
}

inline const char* refusal(const Rows* pairs, int count, const TeamPlan& plan) {
  if (count < 1 || count > kMostPairs) return "a launch takes 1 to 8 pairs of logits";
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

// Of a kernel that reads logits of these dtypes, one beside the other.
inline Grid grid_of(int64_t rows, int pairs, const TeamPlan& plan, std::initializer_list<DType> dtypes) {
  const int64_t teams = (rows + plan.rows_a_block - 1) / plan.rows_a_block;
  int chunks_a_vector = 0;
  for (DType dtype : dtypes) chunks_a_vector += dtype == DType::kFloat ? 2 : 1;
  return {teams * plan.blocks_a_row, pairs, plan.threads_a_row * plan.rows_a_block, plan.blocks_a_row,
          shared_chunks(plan, chunks_a_vector) * int64_t(sizeof(Chunk))};
}

inline Grid row_loss_grid(const Rows* pairs, int count, const TeamPlan& plan) {
  return grid_of(pairs[0].count, count, plan, {pairs[0].student.dtype, pairs[0].teacher.dtype});
}

// No cluster: the blocks of a row are on their own.
inline Grid scale_grid(int64_t rows, const TeamPlan& plan, DType gradient) {
  Grid grid = grid_of(rows, 1, plan, {gradient});
  grid.cluster = 1;
  return grid;
}

}  // namespace cuda
}  // namespace fastkd

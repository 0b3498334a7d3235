// What a launch passes to a kernel, by value.
#pragma once

#include "../row_formulas.h"
#include "../rows.h"

namespace fastkd {
namespace cuda {

// How rows are distributed over threads; chosen by fastkd/ops/team_plan.py.
struct TeamPlan {
  // A power of two; at most a warp if a block has several rows.
  int32_t threads_per_row;
  int32_t rows_per_block;
  int32_t blocks_per_row;  // the cluster size; 1 if a block has several rows, or without clusters
  int32_t slots;           // vectors of each model per thread in shared memory
};

constexpr int kMaxPairs = 8;

// Option values in device memory, which replace the first `count` options.
struct DynamicOptions {
  const float* values;
  int32_t count;
};

// One launch computes up to kMaxPairs pairs of logits with equal rows and classes: the heads of a student.
struct RowLossArguments {
  Rows pairs[kMaxPairs];
  LossOptions options;  // select the kernel; NaN for values in `dynamic`
  DynamicOptions dynamic;
  TeamPlan plan;
};

struct ScaleArguments {
  Matrix gradient;
  const float* grad_output;
  int64_t grad_output_stride, count, classes;
  TeamPlan plan;
};

}  // namespace cuda
}  // namespace fastkd

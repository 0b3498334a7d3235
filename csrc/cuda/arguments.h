// What a launch passes to a kernel, by value.
#pragma once

#include "../row_formulas.h"
#include "../rows.h"

namespace fastkd {
namespace cuda {

// How rows are shared out; chosen by fastkd/ops/team_plan.py.
struct TeamPlan {
  // Threads of a block that work on one row: a power of two, with several rows a block at most a warp.
  int32_t threads_a_row;
  int32_t rows_a_block;
  int32_t blocks_a_row;  // the cluster that shares a row; 1 where a block has several rows, or without clusters
  int32_t slots;         // vectors of each model that a thread has room for in shared memory
};

constexpr int kMostPairs = 8;

// Options whose values only the device's memory holds; none where `values` is null.
struct DynamicOptions {
  const float* values;
  int32_t count;
};

// Several pairs of logits of equal row count and class count go through one launch: the heads of a student.
struct RowLossArguments {
  Rows pairs[kMostPairs];
  LossOptions options;  // they choose the kernel; NaN for what only `dynamic` holds
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

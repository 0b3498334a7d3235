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

// What gather_rows leaves per row for the kernels after it. "The others" are the classes that are not known, without
// the label if there is a cross-entropy.
struct TopKStatistics {
  int64_t position;  // of the label among the known classes; -1: none
  float base;        // of the others' logits
  // Shares of the rest's probability: one of the others has `share` e^{u - base / T}; the label, if it is not known.
  float share, label_share;
  // The cross-entropy, weighted: value, term, and the gradient, t1 e^{z - base_t1} + constant, or `label` at the label.
  float ce_loss, ce_term, base_t1, t1, constant, label;
};
constexpr int kStatisticsWords = sizeof(TopKStatistics) / sizeof(int64_t);

// The rows of K + 1 classes, [N, K + 1] each, and the statistics [N].
struct TopKWorkspace {
  float *student, *gradient;
  TopKStatistics* statistics;
};

// Its size in int64, the type of the tensor that fastkd/ops/native.py allocates.
inline int64_t workspace_words(int64_t rows, int64_t known) { return rows * (kStatisticsWords + known + 1); }

struct TopKArguments {
  Rows rows;
  Known known;
  LossOptions options;
  DynamicOptions dynamic;
  TopKWorkspace workspace;
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

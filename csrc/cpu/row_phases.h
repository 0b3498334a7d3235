// A row is computed in phases, each one pass over its classes. A phase runs on parts of the row, whose results are
// combined before the next phase. A row is one part if rows are distributed over threads, several if each row is split.
#pragma once

#include "kernels.h"

namespace fastkd {
namespace FASTKD_ISA {

// Count, mean and sum of squared deviations of logits.
struct Moments {
  double count, mean, squares;
};

// The result of a phase on one part of a row; each phase uses its own fields.
struct RowPart {
  Moments student, teacher;
  SoftmaxStatistics<double> sums;
  RowLabel label;
  double value_sum, slope_sum, q_first, q_second;
};

// The exponentials of a row, cached by one pass for a later one. Null if they would take too much memory; the later
// pass then recomputes them.
struct Cached {
  float *student, *teacher, *t1;  // one value per class
  float* last_student;            // the student's ragged last block: `student` may have no room for its padding
  float *max_s, *max_t;           // the bases of each block's exponentials
};

// The state of a row between its phases.
struct RowJob {
  const Rows* rows;
  const LossOptions* options;
  int64_t index, label_class;  // -1: no label
  Row<double> row;
  SoftmaxGradient<double> gradient;
  double mean_slope, shifted_mean;  // mixture losses: the mean of h under q, relative to each origin
  Cached cached;
};

// The phases of a loss. `run` processes classes [begin, end); `begin` is a multiple of kBlock.
struct Phases {
  int count;
  bool always_caches;  // also without a gradient
  void (*run[3])(const RowJob&, int64_t begin, int64_t end, RowPart&);
  void (*combine[3])(RowJob&, const RowPart* parts, int count);
};

static void write_loss(const RowJob& job, double value) {
  job.rows->losses[job.index] = float(double(weight_of(*job.rows, job.index)) * value);
}

static void nothing_to_combine(RowJob&, const RowPart*, int) {}

}  // namespace FASTKD_ISA
}  // namespace fastkd

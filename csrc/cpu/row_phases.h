// A row is computed in phases, each of one pass over its classes. A phase runs over parts of the row, whose results
// are combined before the next: one part where rows are shared out over threads, several where a row is.
#pragma once

#include "kernels.h"

namespace fastkd {
namespace FASTKD_ISA {

// Of logits: how many, their mean, and the sum of their squared deviations from it.
struct Moments {
  double count, mean, squares;
};

// What one part of a row gives in a phase; each phase uses its own.
struct RowPart {
  Moments student, teacher;
  SoftmaxStatistics<double> sums;
  RowLabel label;
  double value_sum, slope_sum, q_sum;
};

// What a pass caches of a whole row for a later one, so that no exponential is computed twice. Null where that would take
// too much memory: then the later pass computes them again.
struct Cached {
  float *student, *teacher, *t1;  // one number per class, by block
  float* last_student;            // the student's last block where it is ragged: `student` may end with the row
  float *max_s, *max_t;           // what each block's exponentials are relative to
};

// The state of a row between its phases.
struct RowJob {
  const Rows* rows;
  const LossOptions* options;
  int64_t index, label_class;  // -1: no label
  Row<double> row;
  SoftmaxGradient<double> gradient;
  double mean_slope;  // of a mixture loss: the mean of h under q
  Cached cached;
};

// The phases of a loss. `run` passes over the classes from `begin` to `end` (`begin` a multiple of kBlock).
struct Phases {
  int count;
  bool always_caches;  // also where no gradient is asked for
  void (*run[3])(const RowJob&, int64_t begin, int64_t end, RowPart&);
  void (*combine[3])(RowJob&, const RowPart* parts, int count);
};

static void write_loss(const RowJob& job, double value) {
  job.rows->losses[job.index] = float(double(weight_of(*job.rows, job.index)) * value);
}

static void nothing_to_combine(RowJob&, const RowPart*, int) {}

}  // namespace FASTKD_ISA
}  // namespace fastkd

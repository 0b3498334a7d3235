// Rows of any loss, whole or in parts: the phases that its family's skeleton provides, one after the other.
#pragma once

#include "mixture_rows.h"
#include "pointwise_rows.h"
#include "softmax_rows.h"

namespace fastkd {
namespace FASTKD_ISA {

// nullptr if the loss is unknown, or no kernel is compiled for its needs.
static const Phases* phases_of(const LossOptions& options) {
  return with_loss<const Phases*>(
      options.loss,
      [&](auto loss) {
        typedef decltype(loss) Loss;
        return phases_for<Loss>(options.needs, typename Loss::Family());
      },
      Losses());
}

static bool computes(const LossOptions& options) { return phases_of(options) != nullptr; }

// A thread's cache, retained between calls: at most 32 MiB. Reloading beats recomputing, even from DRAM.
constexpr int64_t kMaxCachedFloats = 1 << 23;

// Memory for the exponentials of a row, number `slot` of `slots` rows in flight; null if too large or not needed.
static Cached cache_for(const Phases& phases, const Rows& rows, const LossOptions& options, int64_t index, int64_t slot,
                        int64_t slots) {
  if (rows.gradient.data == nullptr && !phases.always_caches) return {};
  // A float32 gradient holds the student's exponentials until it is written: less memory traffic.
  const bool in_gradient = rows.gradient.data != nullptr && rows.gradient.dtype == DType::kFloat;
  const int64_t blocks = (rows.classes + kBlock - 1) / kBlock, floats = blocks * kBlock;
  const int64_t student_floats = in_gradient ? kBlock : floats;
  const int64_t at_t1 = options.needs & kStudentAtT1 ? floats : 0;
  const int64_t size = student_floats + floats + at_t1 + 2 * blocks;
  float* memory = size * slots <= kMaxCachedFloats ? scratch(kRowScratch, size * slots) : nullptr;
  if (memory == nullptr) return {};
  float *student = memory + slot * size, *teacher = student + student_floats, *t1 = teacher + floats;
  float *last_student = teacher - kBlock, *max_s = t1 + at_t1;
  if (in_gradient) student = element_at<Element<DType::kFloat>>(rows.gradient, index, 0);
  return {student, teacher, t1, last_student, max_s, max_s + blocks};
}

// Initialises a row. Returns false if the row is done: its weight is 0, or its label out of range.
static bool start_row(RowJob& job, const Rows& rows, const LossOptions& options, int64_t index) {
  job = {&rows, &options, index, -1};
  if (weight_of(rows, index) == 0) {
    write_uncomputed(rows, index, 0.0f);  // its logits are not read
    return false;
  }
  if ((options.needs & kLabelled) && rows.target != nullptr) {
    job.label_class = rows.target[index * rows.target_stride];
    if (job.label_class < 0 || job.label_class >= rows.classes) {
      write_uncomputed(rows, index, __builtin_nanf(""));
      return false;
    }
  }
  job.row.classes = rows.classes;
  if (options.needs & kLabelSmoothing) job.row.origin = first_logit(rows.student, index);
  slopes_of(options, job.row.student.slope, job.row.teacher.slope);
  return true;
}

static bool runs_phase(const Phases& phases, int phase, const Rows& rows) {
  return phase == 0 || phase + 1 < phases.count || rows.gradient.data != nullptr;
}

static void row_loss(const Rows& rows, const LossOptions& options, int64_t begin, int64_t end) {
  const Phases& phases = *phases_of(options);
  for (int64_t index = begin; index < end; index++) {
    RowJob job;
    if (!start_row(job, rows, options, index)) continue;
    job.cached = cache_for(phases, rows, options, index, 0, 1);
    for (int phase = 0; phase < phases.count && runs_phase(phases, phase, rows); phase++) {
      RowPart part{};
      phases.run[phase](job, 0, rows.classes, part);
      phases.combine[phase](job, &part, 1);
    }
  }
}

// The same with each row split into `parts` parts, which `parallel` distributes over threads.
static void row_loss_in_parts(const Rows& rows, const LossOptions& options, int parts, Parallel parallel) {
  struct Call {
    const Rows& rows;
    const LossOptions& options;
    const Phases& phases;
    RowJob* jobs;
    bool* started;
    RowPart* results;
    int64_t parts;
    int phase;
  };
  RowJob* jobs = new RowJob[rows.count];
  bool* started = new bool[rows.count];
  RowPart* results = new RowPart[rows.count * parts];
  Call call = {rows, options, *phases_of(options), jobs, started, results, parts, 0};
  for (int64_t index = 0; index < rows.count; index++) {
    started[index] = start_row(jobs[index], rows, options, index);
    jobs[index].cached = cache_for(call.phases, rows, options, index, index, rows.count);
  }
  for (; call.phase < call.phases.count && runs_phase(call.phases, call.phase, rows); call.phase++) {
    parallel(
        rows.count * parts,
        [](int64_t begin, int64_t end, void* context) {
          const Call& call = *static_cast<Call*>(context);
          const int64_t blocks = (call.rows.classes + kBlock - 1) / kBlock;
          for (int64_t i = begin; i < end; i++) {
            const int64_t index = i / call.parts, part = i % call.parts;
            const int64_t from = blocks * part / call.parts * kBlock, to = blocks * (part + 1) / call.parts * kBlock;
            call.results[i] = {};
            if (call.started[index])
              call.phases.run[call.phase](call.jobs[index], from, to < call.rows.classes ? to : call.rows.classes,
                                          call.results[i]);
          }
        },
        &call);
    for (int64_t index = 0; index < rows.count; index++)
      if (started[index]) call.phases.combine[call.phase](jobs[index], results + index * parts, parts);
  }
  delete[] jobs;
  delete[] started;
  delete[] results;
}

}  // namespace FASTKD_ISA
}  // namespace fastkd

// A thread's share of a row: every size()-th vector of both models, copied to shared memory ahead of use and cached
// there as far as there is room. A thread reads only what it copied itself, so no barrier is needed.
#pragma once

#include "elements.h"
#include "team.h"

namespace fastkd {
namespace cuda {

// Pipeline depth: vectors of each model in flight per thread. With fewer slots than vectors, kStages of the slots are a
// ring buffer for the vectors that are not cached.
constexpr int kStages = 4;

class Share {
 public:
  // The share of row `index`; `classes` is 0 if the row is not read.
  FASTKD_DEVICE Share(const Team& team, const TeamPlan& plan, const Matrix& student, const Matrix& teacher,
                      bool reads_teacher, int64_t index, int classes, float lowest)
      : student_(row_of(student, index)), teacher_(row_of(teacher, index)), lowest_(lowest), classes_(classes) {
    const int phase = phase_of(student_);
    student_.aligned = is_aligned(student_, phase);
    teacher_.aligned = is_aligned(teacher_, phase);
    const int vectors = classes == 0 ? 0 : (classes - 1 + phase) / kVector + 1, member = team.member();
    count_ = vectors > member ? (vectors - 1 - member) / team.size() + 1 : 0;
    first_column_ = member * kVector - phase;
    step_ = team.size() * kVector;
    cached_ = count_ <= plan.slots ? count_ : plan.slots - kStages;
    // Consecutive threads use consecutive chunks: no bank conflicts.
    stride_ = threads_per_block();
    teacher_chunks_ = reads_teacher ? chunks_of(teacher_.dtype) : 0;
    memory_ = shared_memory() + kExchangeChunks + thread_in_block();
  }

  FASTKD_DEVICE const RowPointer& student() const { return student_; }
  FASTKD_DEVICE const RowPointer& teacher() const { return teacher_; }
  FASTKD_DEVICE int phase() const { return phase_of(student_); }

  // Calls visit(column, student logits, teacher logits) for each vector of the share. Columns outside the row are
  // masked classes. If the teacher is not read, its logits are the student's.
  template <class Visit>
  FASTKD_DEVICE void first_pass(const Visit& visit) const {
#pragma unroll 1
    for (int k = -kStages; k < count_; k++) {
      if (k >= 0) {
        wait_for_copies<kStages - 1>();
        visit_vector(k, visit);
      }
      if (k + kStages < count_) fetch(k + kStages);
      commit_copies();
    }
  }

  // The same, last vector first: of the vectors that are not cached in shared memory, the last are most likely in L2.
  template <class Visit>
  FASTKD_DEVICE void next_pass(const Visit& visit) const {
#pragma unroll 1
    for (int k = count_ - 1 + kStages; k >= 0; k--) {
      if (k < count_) {
        wait_for_copies<kStages - 1>();
        visit_vector(k, visit);
      }
      if (k - kStages >= cached_) fetch(k - kStages);
      commit_copies();
    }
  }

 private:
  FASTKD_DEVICE int column(int k) const { return first_column_ + k * step_; }
  FASTKD_DEVICE Chunk* slot(int k) const {
    const int number = k < cached_ ? k : cached_ + (k - cached_) % kStages;
    return memory_ + number * (chunks_of(student_.dtype) + teacher_chunks_) * stride_;
  }
  FASTKD_DEVICE Chunk* teacher_part(Chunk* slot) const { return slot + chunks_of(student_.dtype) * stride_; }

  FASTKD_DEVICE void fetch(int k) const {
    Chunk* to = slot(k);
    fetch_vector(student_, column(k), classes_, to, stride_);
    if (teacher_chunks_ != 0) fetch_vector(teacher_, column(k), classes_, teacher_part(to), stride_);
  }

  template <class Visit>
  FASTKD_DEVICE void visit_vector(int k, const Visit& visit) const {
    float z_s[kVector], z_t[kVector];
    Chunk* from = slot(k);
    read_vector(from, stride_, student_.dtype, lowest_, z_s);
    if (teacher_chunks_ != 0) {
      read_vector(teacher_part(from), stride_, teacher_.dtype, lowest_, z_t);
    } else {
      for (int i = 0; i < kVector; i++) z_t[i] = z_s[i];
    }
    visit(column(k), z_s, z_t);
  }

  RowPointer student_, teacher_;
  float lowest_;
  int classes_, count_, cached_, first_column_, step_, stride_, teacher_chunks_;
  Chunk* memory_;
};

// Shared memory of a block, in chunks. Called by the host.
inline int64_t shared_chunks(const TeamPlan& plan, int chunks_per_vector) {
  return kExchangeChunks + int64_t(plan.slots) * chunks_per_vector * plan.threads_per_row * plan.rows_per_block;
}

}  // namespace cuda
}  // namespace fastkd

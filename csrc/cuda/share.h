// A thread's share of a row: every size()-th vector of both models, brought to shared memory ahead of its use and cached
// there as far as there is room. A thread reads back only what it fetched itself, so no barrier is needed.
#pragma once

#include "elements.h"
#include "team.h"

namespace fastkd {
namespace cuda {

// Vectors of each model that a thread has under way. With fewer slots than vectors, as many slots are a ring through
// which pass the vectors that are not cached.
constexpr int kAhead = 4;

class Share {
 public:
  // Of the row `index`, of which `classes` columns are to be read: none, where the row is left out.
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
    cached_ = count_ <= plan.slots ? count_ : plan.slots - kAhead;
    // Chunks of a slot lie a block's width apart: neighbouring threads use neighbouring chunks.
    stride_ = threads_of_block();
    teacher_chunks_ = reads_teacher ? chunks_of(teacher_.dtype) : 0;
    memory_ = shared_memory() + kExchangeChunks + thread_of_block();
  }

  FASTKD_DEVICE const RowPointer& student() const { return student_; }
  FASTKD_DEVICE const RowPointer& teacher() const { return teacher_; }
  FASTKD_DEVICE int phase() const { return phase_of(student_); }

  // Calls visit(column, student logits, teacher logits) for each vector of the share. Columns outside of the row are
  // masked classes. A teacher that is not read is the student.
  template <class Visit>
  FASTKD_DEVICE void first_pass(const Visit& visit) const {
#pragma unroll 1
    for (int k = -kAhead; k < count_; k++) {
      if (k >= 0) {
        wait_for_copies<kAhead - 1>();
        visit_vector(k, visit);
      }
      if (k + kAhead < count_) fetch(k + kAhead);
      commit_copies();
    }
  }

  // The same last vector first: of what was not cached, the last came last through the second-level cache.
  template <class Visit>
  FASTKD_DEVICE void next_pass(const Visit& visit) const {
#pragma unroll 1
    for (int k = count_ - 1 + kAhead; k >= 0; k--) {
      if (k < count_) {
        wait_for_copies<kAhead - 1>();
        visit_vector(k, visit);
      }
      if (k - kAhead >= cached_) fetch(k - kAhead);
      commit_copies();
    }
  }

 private:
  FASTKD_DEVICE int column(int k) const { return first_column_ + k * step_; }
  FASTKD_DEVICE Chunk* slot(int k) const {
    const int number = k < cached_ ? k : cached_ + (k - cached_) % kAhead;
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

// How many chunks of shared memory a block needs, for vectors of so many chunks. The host sizes the launch with it.
inline int64_t shared_chunks(const TeamPlan& plan, int chunks_a_vector) {
  return kExchangeChunks + int64_t(plan.slots) * chunks_a_vector * plan.threads_a_row * plan.rows_a_block;
}

}  // namespace cuda
}  // namespace fastkd

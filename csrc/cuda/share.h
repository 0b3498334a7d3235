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

// Without kTeacher the teacher is not read; its logits are the student's.
template <class Type, bool kTeacher = true>
class Share {
 public:
  // The share of row `index`; `classes` is 0 if the row is not read.
  FASTKD_DEVICE Share(const Team& team, const TeamPlan& plan, const Matrix& student, const Matrix& teacher,
                      int64_t index, int classes)
      : phase_(phase_of(row_of<Type>(student, index))), classes_(classes),
        student_(row_of<Type>(student, index, phase_, classes)),
        teacher_(row_of<Type>(teacher, index, phase_, classes)) {
    whole_end_ = student_.whole_end;
    if (kTeacher && teacher_.whole_end < whole_end_) whole_end_ = teacher_.whole_end;
    const int vectors = classes == 0 ? 0 : (classes - 1 + phase_) / kVector + 1, member = team.member();
    count_ = vectors > member ? (vectors - 1 - member) / team.size() + 1 : 0;
    first_column_ = member * kVector - phase_;
    step_ = team.size() * kVector;
    cached_ = count_ <= plan.slots ? count_ : plan.slots - kStages;
    // Consecutive threads use consecutive chunks: no bank conflicts.
    stride_ = threads_per_block() * int(sizeof(Chunk));
    teacher_at_ = chunks_of(student_.type.dtype()) * stride_;
    pitch_ = teacher_at_ + (kTeacher ? chunks_of(teacher_.type.dtype()) * stride_ : 0);
    slots_ = shared_address(shared_memory() + kExchangeChunks + thread_in_block());
    ring_ = slots_ + cached_ * pitch_;
  }

  FASTKD_DEVICE const RowPointer<Type>& student() const { return student_; }
  FASTKD_DEVICE int phase() const { return phase_; }

  // Calls visit(column, student's vector, teacher's vector) for each vector of the share. Columns outside the row are
  // masked classes; without kClamps, -inf.
  template <bool kClamps = true, class Visit>
  FASTKD_DEVICE void first_pass(const Visit& visit) const {
#pragma unroll 1
    for (int k = 0; k < kStages; k++) {
      if (k < count_) fetch(first_column_ + k * step_, slots_ + k * pitch_);
      commit_copies();
    }
    SharedAddress slot = slots_;
    int column = first_column_;
#pragma unroll 1
    for (int k = 0; k < count_; k++) {
      wait_for_copies<kStages - 1>();
      visit_vector<kClamps>(slot, column, visit);
      // The vector kStages later takes the place of this one if both are in the ring.
      if (k + kStages < count_) fetch(column + kStages * step_, k < cached_ ? slot + kStages * pitch_ : slot);
      commit_copies();
      column += step_;
      slot += pitch_;
      if (slot == ring_ + kStages * pitch_) slot = ring_;
    }
  }

  // The same, last vector first: of the vectors that are not cached in shared memory, the last are most likely in L2.
  template <bool kClamps = true, class Visit>
  FASTKD_DEVICE void next_pass(const Visit& visit) const {
#pragma unroll 1
    for (int k = count_ - 1; k >= count_ - kStages; k--) {
      if (k >= cached_) fetch(first_column_ + k * step_, slot_of(k));
      commit_copies();
    }
    SharedAddress slot = slot_of(count_ - 1);
    int column = first_column_ + (count_ - 1) * step_;
#pragma unroll 1
    for (int k = count_ - 1; k >= 0; k--) {
      const bool in_ring = k >= cached_;
      if (in_ring) wait_for_copies<kStages - 1>();
      visit_vector<kClamps>(slot, column, visit);
      if (in_ring) {
        if (k - kStages >= cached_) fetch(column - kStages * step_, slot);
        commit_copies();
        if (slot == ring_ && k > cached_) slot += kStages * pitch_;
      }
      column -= step_;
      slot -= pitch_;
    }
  }

 private:
  FASTKD_DEVICE SharedAddress slot_of(int k) const {
    return slots_ + (k < cached_ ? k : cached_ + (k - cached_) % kStages) * pitch_;
  }

  FASTKD_DEVICE void fetch(int column, SharedAddress to) const {
    if (unsigned(column) < whole_end_) {
      copy_vector(student_, column, to, stride_);
      if (kTeacher) copy_vector(teacher_, column, to + teacher_at_, stride_);
    } else {
      gather_vector(student_, column, classes_, to, stride_);
      if (kTeacher) gather_vector(teacher_, column, classes_, to + teacher_at_, stride_);
    }
  }

  template <bool kClamps, class Visit>
  FASTKD_DEVICE void visit_vector(SharedAddress from, int column, const Visit& visit) const {
    Vector<Type, kClamps> student(from, stride_, student_.type);
    if (kTeacher) {
      Vector<Type, kClamps> teacher(from + teacher_at_, stride_, teacher_.type);
      visit(column, student, teacher);
    } else {
      Vector<Type, kClamps> teacher = student;
      visit(column, student, teacher);
    }
  }

  int phase_, classes_;
  RowPointer<Type> student_, teacher_;
  unsigned whole_end_;
  int count_, cached_, first_column_, step_, stride_, teacher_at_, pitch_;  // the last three in bytes
  SharedAddress slots_, ring_;
};

// Shared memory of a block, in chunks. Called by the host.
inline int64_t shared_chunks(const TeamPlan& plan, int chunks_per_vector) {
  return kExchangeChunks + int64_t(plan.slots) * chunks_per_vector * plan.threads_per_row * plan.rows_per_block;
}

}  // namespace cuda
}  // namespace fastkd

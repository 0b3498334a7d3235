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

template <class Type, bool kClamps = true>
class Share {
 public:
  typedef cuda::Vector<Type, kClamps> Vector;

  // The share of row `index`; `classes` is 0 if the row is not read.
  FASTKD_DEVICE Share(const Team& team, const TeamPlan& plan, const Matrix& student, const Matrix& teacher,
                      bool reads_teacher, int64_t index, int classes)
      : phase_(phase_of(row_of<Type>(student, index))), classes_(classes),
        student_(row_of<Type>(student, index, phase_, classes)),
        teacher_(row_of<Type>(teacher, index, phase_, classes)), reads_teacher_(reads_teacher) {
    whole_end_ = student_.whole_end < teacher_.whole_end ? student_.whole_end : teacher_.whole_end;
    const int vectors = classes == 0 ? 0 : (classes - 1 + phase_) / kVector + 1, member = team.member();
    count_ = vectors > member ? (vectors - 1 - member) / team.size() + 1 : 0;
    first_column_ = member * kVector - phase_;
    step_ = team.size() * kVector;
    cached_ = count_ <= plan.slots ? count_ : plan.slots - kStages;
    // Consecutive threads use consecutive chunks: no bank conflicts.
    stride_ = threads_per_block();
    teacher_at_ = chunks_of(student_.type.dtype()) * stride_;
    pitch_ = teacher_at_ + (reads_teacher ? chunks_of(teacher_.type.dtype()) * stride_ : 0);
    slots_ = shared_memory() + kExchangeChunks + thread_in_block();
  }

  FASTKD_DEVICE const RowPointer<Type>& student() const { return student_; }
  FASTKD_DEVICE int phase() const { return phase_; }

  // Calls visit(column, student's vector, teacher's vector) for each vector of the share. Columns outside the row are
  // masked classes. If the teacher is not read, its logits are the student's.
  template <class Visit>
  FASTKD_DEVICE void first_pass(const Visit& visit) const {
#pragma unroll 1
    for (int k = 0; k < kStages; k++) {
      if (k < count_) fetch(first_column_ + k * step_, slots_ + k * pitch_);
      commit_copies();
    }
    Chunk* const ring = slots_ + cached_ * pitch_;
    Chunk* slot = slots_;
    int column = first_column_;
#pragma unroll 1
    for (int k = 0; k < count_; k++) {
      wait_for_copies<kStages - 1>();
      visit_vector(slot, column, visit);
      // The vector kStages later: of the ring it takes this one's place.
      if (k + kStages < count_) fetch(column + kStages * step_, k < cached_ ? slot + kStages * pitch_ : slot);
      commit_copies();
      column += step_;
      slot += pitch_;
      if (slot == ring + kStages * pitch_) slot = ring;
    }
  }

  // The same, last vector first: of the vectors that are not cached in shared memory, the last are most likely in L2.
  template <class Visit>
  FASTKD_DEVICE void next_pass(const Visit& visit) const {
#pragma unroll 1
    for (int k = count_ - 1; k >= count_ - kStages; k--) {
      if (k >= cached_) fetch(first_column_ + k * step_, slot_of(k));
      commit_copies();
    }
    Chunk* const ring = slots_ + cached_ * pitch_;
    Chunk* slot = slot_of(count_ - 1);
    int column = first_column_ + (count_ - 1) * step_;
#pragma unroll 1
    for (int k = count_ - 1; k >= 0; k--) {
      const bool in_ring = k >= cached_;
      if (in_ring) wait_for_copies<kStages - 1>();
      visit_vector(slot, column, visit);
      if (in_ring) {
        if (k - kStages >= cached_) fetch(column - kStages * step_, slot);
        commit_copies();
        if (slot == ring && k > cached_) slot += kStages * pitch_;
      }
      column -= step_;
      slot -= pitch_;
    }
  }

 private:
  FASTKD_DEVICE Chunk* slot_of(int k) const {
    return slots_ + (k < cached_ ? k : cached_ + (k - cached_) % kStages) * pitch_;
  }

  FASTKD_DEVICE void fetch(int column, Chunk* to) const {
    if (unsigned(column) < whole_end_) {
      copy_vector(student_, column, to, stride_);
      if (reads_teacher_) copy_vector(teacher_, column, to + teacher_at_, stride_);
    } else {
      gather_vector(student_, column, classes_, to, stride_);
      if (reads_teacher_) gather_vector(teacher_, column, classes_, to + teacher_at_, stride_);
    }
  }

  template <class Visit>
  FASTKD_DEVICE void visit_vector(const Chunk* from, int column, const Visit& visit) const {
    Vector student(from, stride_, student_.type);
    Vector teacher(reads_teacher_ ? from + teacher_at_ : from, stride_,
                   reads_teacher_ ? teacher_.type : student_.type);
    visit(column, student, teacher);
  }

  int phase_, classes_;
  RowPointer<Type> student_, teacher_;
  bool reads_teacher_;
  unsigned whole_end_;
  int count_, cached_, first_column_, step_, stride_, teacher_at_, pitch_;
  Chunk* slots_;
};

// Shared memory of a block, in chunks. Called by the host.
inline int64_t shared_chunks(const TeamPlan& plan, int chunks_per_vector) {
  return kExchangeChunks + int64_t(plan.slots) * chunks_per_vector * plan.threads_per_row * plan.rows_per_block;
}

}  // namespace cuda
}  // namespace fastkd

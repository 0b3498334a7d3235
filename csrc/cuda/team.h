// The threads that share a row, and sums and maxima over them: within a warp by shuffles, over the warps of a block
// through its shared memory, over the blocks of a cluster through theirs. The order of every addition is fixed and
// all threads get the same bits, so a result repeats bit for bit.
#pragma once

#include "arguments.h"
#include "device.h"

namespace fastkd {
namespace cuda {

constexpr int kMostSums = 8;
constexpr int kMostWarps = kMostThreads / kWarp;
// For each exchange a value of every warp and one of the block; two areas, used in turn: who writes an area again has
// passed the barrier of the exchange between, before which everyone was done reading it.
constexpr int kExchangeFloats = (kMostWarps + 1) * kMostSums;
constexpr int kExchangeChunks = 2 * kExchangeFloats * int(sizeof(float)) / int(sizeof(Chunk));

struct Sum {
  static constexpr float kNothing = 0.0f;
  FASTKD_DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Max {
  static constexpr float kNothing = kMasked;
  FASTKD_DEVICE float operator()(float a, float b) const { return a > b ? a : b; }
};

class Team {
 public:
  FASTKD_DEVICE explicit Team(const TeamPlan& plan)
      : threads_(plan.threads_a_row), blocks_(plan.blocks_a_row), thread_(thread_of_block() & (plan.threads_a_row - 1)),
        rank_(int(block_x() % unsigned(plan.blocks_a_row))),
        row_(int64_t(block_x() / unsigned(plan.blocks_a_row)) * plan.rows_a_block +
             thread_of_block() / plan.threads_a_row) {}

  FASTKD_DEVICE int64_t row() const { return row_; }
  FASTKD_DEVICE int size() const { return threads_ * blocks_; }
  FASTKD_DEVICE int member() const { return rank_ * threads_ + thread_; }

  // Combines the values of all members. Every thread of the block, and of the cluster, must come here.
  template <class Combine, int kCount>
  FASTKD_DEVICE void all(float (&values)[kCount], Combine combine) {
    static_assert(kCount <= kMostSums, "the exchange area is too small");
    const int lane = thread_ & (kWarp - 1), warp = thread_ / kWarp;
    over_lanes(values, combine, threads_ < kWarp ? threads_ : kWarp);
    float* area = reinterpret_cast<float*>(shared_memory()) + (exchanges_++ & 1) * kExchangeFloats;
    if (threads_ > kWarp) {
      if (lane == 0)
        for (int i = 0; i < kCount; i++) area[warp * kCount + i] = values[i];
      block_barrier();
      const int other = lane & (kMostWarps - 1);
      const bool exists = other < threads_ / kWarp;
      for (int i = 0; i < kCount; i++) values[i] = exists ? area[other * kCount + i] : Combine::kNothing;
      over_lanes(values, combine, kMostWarps);
    }
    if (blocks_ > 1) {
      float* of_block = area + kMostWarps * kMostSums;
      if (thread_ == 0)
        for (int i = 0; i < kCount; i++) of_block[i] = values[i];
      cluster_arrive();
      cluster_wait();
      const int rank = lane & (kMostBlocks - 1);
      const float* theirs = shared_of_block(of_block, rank < blocks_ ? rank : 0);
      for (int i = 0; i < kCount; i++) values[i] = rank < blocks_ ? theirs[i] : Combine::kNothing;
      over_lanes(values, combine, kMostBlocks);
    }
  }

  // After the last exchange, and before the end: a block must not end while another reads its shared memory.
  FASTKD_DEVICE void done_exchanging() const {
    if (blocks_ > 1) cluster_arrive();
  }
  FASTKD_DEVICE void leave() const {
    if (blocks_ > 1) cluster_wait();
  }

 private:
  // Over groups of `lanes` lanes, a power of two.
  template <class Combine, int kCount>
  FASTKD_DEVICE static void over_lanes(float (&values)[kCount], Combine combine, int lanes) {
    float others[kCount];
#pragma unroll 1
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
      shuffle_xor(values, mask, others);
      for (int i = 0; i < kCount; i++) values[i] = combine(values[i], others[i]);
    }
  }

  int threads_, blocks_, thread_, rank_, exchanges_ = 0;
  int64_t row_;
};

}  // namespace cuda
}  // namespace fastkd

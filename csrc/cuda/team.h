// The threads that share a row, and reductions over them: by shuffles within a warp, through shared memory between the
// warps of a block, through distributed shared memory between the blocks of a cluster. The order of additions is fixed
// and all threads get the same bits: results are deterministic.
#pragma once

#include "arguments.h"
#include "device.h"

namespace fastkd {
namespace cuda {

constexpr int kMaxSums = 8;
constexpr int kMaxWarps = kMaxThreads / kWarp;
// Per exchange, the values of every warp and those of the block. Double-buffered: the barrier of the intervening
// exchange orders the reuse of a buffer after its last read.
constexpr int kExchangeFloats = (kMaxWarps + 1) * kMaxSums;
constexpr int kExchangeChunks = 2 * kExchangeFloats * int(sizeof(float)) / int(sizeof(Chunk));

struct Sum {
  static constexpr float kIdentity = 0.0f;
  FASTKD_DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Max {
  static constexpr float kIdentity = kMasked;
  FASTKD_DEVICE float operator()(float a, float b) const { return larger(a, b); }
};

class Team {
 public:
  FASTKD_DEVICE explicit Team(const TeamPlan& plan)
      : threads_(plan.threads_per_row), blocks_(plan.blocks_per_row),
        thread_(thread_in_block() & (plan.threads_per_row - 1)), rank_(int(block_x() % unsigned(plan.blocks_per_row))),
        row_(int64_t(block_x() / unsigned(plan.blocks_per_row)) * plan.rows_per_block +
             thread_in_block() / plan.threads_per_row) {}

  FASTKD_DEVICE int64_t row() const { return row_; }
  FASTKD_DEVICE int size() const { return threads_ * blocks_; }
  FASTKD_DEVICE int member() const { return rank_ * threads_ + thread_; }

  // Reduces the values over all members. Every thread of the block, and of the cluster, must call it.
  template <class Combine, int kCount>
  FASTKD_DEVICE void all_reduce(float (&values)[kCount], Combine combine) {
    static_assert(kCount <= kMaxSums, "kMaxSums is too small");
    const int lane = thread_ & (kWarp - 1), warp = thread_ / kWarp;
    reduce_lanes(values, combine, threads_ < kWarp ? threads_ : kWarp);
    float* buffer = reinterpret_cast<float*>(shared_memory()) + (exchanges_++ & 1) * kExchangeFloats;
    if (threads_ > kWarp) {
      if (lane == 0)
        for (int i = 0; i < kCount; i++) buffer[warp * kCount + i] = values[i];
      block_barrier();
      const int source = lane & (kMaxWarps - 1);
      const bool exists = source < threads_ / kWarp;
      for (int i = 0; i < kCount; i++) values[i] = exists ? buffer[source * kCount + i] : Combine::kIdentity;
      reduce_lanes(values, combine, kMaxWarps);
    }
    if (blocks_ > 1) {
      float* block_values = buffer + kMaxWarps * kMaxSums;
      if (thread_ == 0)
        for (int i = 0; i < kCount; i++) block_values[i] = values[i];
      cluster_arrive();
      cluster_wait();
      const int rank = lane & (kMaxBlocks - 1);
      const float* remote = map_shared_rank(block_values, rank < blocks_ ? rank : 0);
      for (int i = 0; i < kCount; i++) values[i] = rank < blocks_ ? remote[i] : Combine::kIdentity;
      reduce_lanes(values, combine, kMaxBlocks);
    }
  }

  // Members see what others wrote before it. Every thread of the block, and of the cluster, must call it.
  FASTKD_DEVICE void barrier() const {
    if (blocks_ > 1) {
      cluster_arrive();
      cluster_wait();
    } else {
      block_barrier();
    }
  }

  // A block must not exit while others read its shared memory: call the first after the last exchange, the second
  // before the end of the kernel.
  FASTKD_DEVICE void arrive_before_exit() const {
    if (blocks_ > 1) cluster_arrive();
  }
  FASTKD_DEVICE void wait_before_exit() const {
    if (blocks_ > 1) cluster_wait();
  }

 private:
  // Reduces over groups of `lanes` lanes, a power of two.
  template <class Combine, int kCount>
  FASTKD_DEVICE static void reduce_lanes(float (&values)[kCount], Combine combine, int lanes) {
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

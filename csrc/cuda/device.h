// The few things that the kernels ask of the hardware. Everything else in this folder is plain C++, which
// tests/cuda_emulation/ compiles for the host with its own implementation of these.
#pragma once

#include <cstdint>

namespace fastkd {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kMostThreads = 512;  // of a block: up to 128 registers a thread
constexpr int kMostBlocks = 8;     // of a cluster, the largest size that every device with clusters has

// What one instruction moves: 4 float or 8 half or bfloat16 logits.
struct alignas(16) Chunk {
  uint32_t word[4];
};

}  // namespace cuda
}  // namespace fastkd

#ifndef __CUDACC__
#include "cuda_emulation.h"
#else
#define FASTKD_DEVICE __device__ __forceinline__
// One block of the largest size may take all registers: asked for no number, the compiler takes 64 a thread and spills.
#define FASTKD_KERNEL __global__ void __launch_bounds__(fastkd::cuda::kMostThreads, 1)
#define FASTKD_PARAMETER const __grid_constant__

namespace fastkd {
namespace cuda {

// ---- where we are ----------------------------------------------------------------------------------------------

FASTKD_DEVICE int thread_of_block() { return int(threadIdx.x); }
FASTKD_DEVICE int threads_of_block() { return int(blockDim.x); }
FASTKD_DEVICE unsigned block_x() { return blockIdx.x; }
FASTKD_DEVICE int block_y() { return int(blockIdx.y); }

FASTKD_DEVICE Chunk* shared_memory() {
  extern __shared__ uint4 dynamic_shared_memory[];
  return reinterpret_cast<Chunk*>(dynamic_shared_memory);
}

// ---- threads of a warp, a block, a cluster ---------------------------------------------------------------------

// The values of the lane whose number differs in the bits of `mask`. All lanes of the warp must come here.
template <int kCount>
FASTKD_DEVICE void shuffle_xor(const float (&values)[kCount], int mask, float (&others)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) others[i] = __shfl_xor_sync(0xffffffffu, values[i], mask);
}

FASTKD_DEVICE void block_barrier() { __syncthreads(); }

// The cluster's barrier in two halves: what a block wrote before it arrives, the others may read after they waited.
FASTKD_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
FASTKD_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Shared memory of another block of the cluster, by the address of ours.
FASTKD_DEVICE const float* shared_of_block(const float* ours, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(ours), "r"(rank));
  return reinterpret_cast<const float*>(theirs);
#else
  return ours;
#endif
}

// ---- memory ----------------------------------------------------------------------------------------------------

// Global to shared memory, past the registers and the first-level cache; both 16-byte aligned.
FASTKD_DEVICE void copy_async(Chunk* to, const void* from) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
FASTKD_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups of copies are under way.
template <int kPending>
FASTKD_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Written once and not read again soon: must not push logits out of the second-level cache.
FASTKD_DEVICE void store_streaming(void* to, const Chunk& chunk) {
  __stcs(static_cast<uint4*>(to), make_uint4(chunk.word[0], chunk.word[1], chunk.word[2], chunk.word[3]));
}

// ---- arithmetic ------------------------------------------------------------------------------------------------
// The code is compiled with -fmad=false: products are rounded where they stand, so that two equal ones cancel to 0.
// A multiply-add is fused where it is written so.

FASTKD_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FASTKD_DEVICE float quotient(float a, float b) { return __fdividef(a, b); }  // within 2 units, |b| < 2^126

// 2^y within 2^-22 of it, 0 below 2^-126; NaN stays.
FASTKD_DEVICE float power_of_two(float y) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(y));
  return power;
}

FASTKD_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
FASTKD_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }

// The instructions themselves: the toolkit's headers for these types take longer to compile than all kernels.
FASTKD_DEVICE float half_to_float(uint32_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(uint16_t(bits)));
  return value;
}
FASTKD_DEVICE uint32_t float_to_half(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
FASTKD_DEVICE uint32_t float_to_bfloat16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

}  // namespace cuda
}  // namespace fastkd
#endif

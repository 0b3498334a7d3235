// The hardware interface of the kernels. Everything else in this folder is plain C++, which tests/cuda_emulation/
// compiles for the host with its own implementation of this header.
#pragma once

#include <cstdint>

namespace fastkd {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;  // per block
// Launch bounds, by which the compiler divides a multiprocessor's registers: 80 per thread, for three blocks of 256; or
// 128, for kernels that would spill with 80.
constexpr int k80Registers = 768, k128Registers = kMaxThreads;
// Blocks per cluster. Every GPU with clusters runs the portable sizes; larger ones launch.cu has to ask for.
constexpr int kMaxBlocks = 16, kPortableBlocks = 8;

// The unit of vector loads and stores: 4 float, or 8 half or bfloat16 logits.
struct alignas(16) Chunk {
  uint32_t word[4];
};

}  // namespace cuda
}  // namespace fastkd

#ifndef __CUDACC__
#include "cuda_emulation.h"
#else
#define FASTKD_DEVICE __device__ __forceinline__
#define FASTKD_KERNEL(bound) __global__ void __launch_bounds__(bound, 1)
#define FASTKD_PARAMETER const __grid_constant__

namespace fastkd {
namespace cuda {

// ---- indices ---------------------------------------------------------------------------------------------------

FASTKD_DEVICE int thread_in_block() { return int(threadIdx.x); }
FASTKD_DEVICE int threads_per_block() { return int(blockDim.x); }
FASTKD_DEVICE unsigned block_x() { return blockIdx.x; }
FASTKD_DEVICE int block_y() { return int(blockIdx.y); }

FASTKD_DEVICE Chunk* shared_memory() {
  extern __shared__ uint4 dynamic_shared_memory[];
  return reinterpret_cast<Chunk*>(dynamic_shared_memory);
}

// ---- threads of a warp, a block, a cluster ---------------------------------------------------------------------

// Values of lane (lane ^ mask). All lanes of the warp must call it.
template <int kCount>
FASTKD_DEVICE void shuffle_xor(const float (&values)[kCount], int mask, float (&others)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) others[i] = __shfl_xor_sync(0xffffffffu, values[i], mask);
}

FASTKD_DEVICE void block_barrier() { __syncthreads(); }

// A split cluster barrier: writes before arrive are visible to the cluster's other blocks after wait.
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

// The address in block `rank` of the cluster that corresponds to `local` in this block's shared memory.
FASTKD_DEVICE const float* map_shared_rank(const float* local, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t remote;
  asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(local), "r"(rank));
  return reinterpret_cast<const float*>(remote);
#else
  return local;
#endif
}

// ---- memory ----------------------------------------------------------------------------------------------------

// A byte of shared memory: half a pointer's registers and arithmetic. The functions that take it keep their order.
typedef uint32_t SharedAddress;
FASTKD_DEVICE SharedAddress shared_address(const Chunk* chunk) { return uint32_t(__cvta_generic_to_shared(chunk)); }

// Asynchronous copy from global to shared memory, bypassing registers and L1; both 16-byte aligned.
FASTKD_DEVICE void copy_async(SharedAddress to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from));
}
FASTKD_DEVICE Chunk load_shared(SharedAddress from) {
  Chunk chunk;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(chunk.word[0]), "=r"(chunk.word[1]), "=r"(chunk.word[2]), "=r"(chunk.word[3])
               : "r"(from));
  return chunk;
}
FASTKD_DEVICE void store_shared(SharedAddress to, uint32_t word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(word));
}
FASTKD_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;"); }

// Waits until at most kPending of this thread's copy groups are in flight.
template <int kPending>
FASTKD_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending));
}

// The pointer, which the compiler then keeps in registers: in a loop it would rather add up its parts again.
FASTKD_DEVICE char* kept(char* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

// Streaming store: the gradient is not read again soon and must not evict logits from L2.
FASTKD_DEVICE void store_streaming(void* to, const Chunk& chunk) {
  __stcs(static_cast<uint4*>(to), make_uint4(chunk.word[0], chunk.word[1], chunk.word[2], chunk.word[3]));
}

// ---- arithmetic ------------------------------------------------------------------------------------------------
// Compiled with -fmad=false: every product is rounded, so that two equal ones cancel to 0. Multiply-adds are explicit.
// And with -prec-div=false: a quotient is within 2 ulp, so that x / x need not be 1.

FASTKD_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FASTKD_DEVICE float rounded_quotient(float a, float b) { return __fdiv_rn(a, b); }  // to nearest: 1 for equal numbers

// 1 / x within 1 ulp, for 2^-126 <= |x| <= 2^126.
FASTKD_DEVICE float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 2^y with relative error 2^-22; 0 below 2^-126. Propagates NaN.
FASTKD_DEVICE float power_of_two(float y) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(y));
  return power;
}

// log2(x) of x >= 2^-126, with an absolute error of 2^-22 between 1/2 and 2, and a relative one beyond.
FASTKD_DEVICE float log_of_two(float x) {
  float power;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

FASTKD_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
FASTKD_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }

// Inline PTX: the toolkit's headers for these types take longer to compile than all kernels.
FASTKD_DEVICE float half_to_float(uint32_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(uint16_t(bits)));
  return value;
}
// Two numbers in one word, the first in its lower half, rounded to nearest.
FASTKD_DEVICE uint32_t half_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
FASTKD_DEVICE uint32_t bfloat16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The larger number; of a number and NaN, the number, or with or_nan the NaN.
FASTKD_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
FASTKD_DEVICE float larger_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
FASTKD_DEVICE uint32_t larger_half_pair(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("max.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
FASTKD_DEVICE uint32_t larger_bfloat16_pair(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
FASTKD_DEVICE uint32_t larger_or_nan_bfloat16_pair(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

}  // namespace cuda
}  // namespace fastkd
#endif

// Runs the kernels of csrc/cuda/ on the host: csrc/cuda/device.h includes this header without a CUDA compiler.
//
// Every thread of a cluster is a fiber, which yields at barriers and shuffles. A warp runs as far ahead of the others
// as barriers allow, in alternating order of the warps, so that a missing barrier shows; a deadlock is an error. Shared
// memory is NaN before a block starts and after it ends, and is followed by guard words. Asynchronous copies complete
// only when they are waited for.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#define FASTKD_DEVICE inline
#define FASTKD_KERNEL(bound) inline void
#define FASTKD_PARAMETER

namespace fastkd {
namespace cuda {
namespace emulation {

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
};

struct Copy {
  void* to;
  const void* from;
};

constexpr uint32_t kGuard = 0x7fdeadbe;  // a NaN
constexpr int kGuardChunks = 64;
constexpr Chunk kUnwritten = {kGuard, kGuard, kGuard, kGuard};

struct Block {
  int64_t x;
  int y, threads, unfinished;
  std::vector<Chunk> shared;
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<float> lanes;  // the values of a shuffle, double-buffered
};

constexpr int kMaxShuffled = 16;
constexpr size_t kStackBytes = 48 * 1024;

struct Fiber {
  Block* block;
  int thread;
  unsigned shuffles = 0, cluster_generation = 0;
  bool finished = false;
  std::deque<std::vector<Copy>> copies{{}};
  ucontext_t context;
  jmp_buf resume;
  bool started = false;
};

struct Machine {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::unique_ptr<char[]> stacks;
  size_t stack_bytes = 0;
  Barrier cluster;
  jmp_buf resume_scheduler;
  size_t current = 0;
  size_t progress = 0;  // arrivals at barriers and ends of fibers
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  bool failed = false;
};
inline Machine machine;
inline Fiber& current_fiber() { return machine.fibers[machine.current]; }

inline void run_fiber() {
  machine.body(machine.argument);
  current_fiber().finished = true;
  machine.progress++;
  Block& block = *current_fiber().block;
  if (--block.unfinished == 0) std::fill(block.shared.begin(), block.shared.end() - kGuardChunks, kUnwritten);
  _longjmp(machine.resume_scheduler, 1);
}

// Yields to the scheduler.
inline void yield() {
  if (_setjmp(current_fiber().resume) == 0) _longjmp(machine.resume_scheduler, 1);
}

inline unsigned arrive(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  machine.progress++;
  if (++barrier.arrived == barrier.expected) barrier.arrived = 0, barrier.generation++;
  return generation;
}
inline void wait(const Barrier& barrier, unsigned generation) {
  while (barrier.generation == generation) yield();
}

inline void resume(size_t fiber) {
  machine.current = fiber;
  if (current_fiber().finished || _setjmp(machine.resume_scheduler) != 0) return;
  if (current_fiber().started) _longjmp(current_fiber().resume, 1);
  current_fiber().started = true;
  setcontext(&current_fiber().context);
}

// Runs the threads of a cluster to their end; false on deadlock.
inline bool run_cluster(void (*body)(void*), void* argument) {
  machine.body = body;
  machine.argument = argument;
  const size_t warps = machine.fibers.size() / kWarp;
  size_t before, warp_progress;
  for (size_t round = 0;; round++) {
    before = machine.progress;
    for (size_t i = 0; i < warps; i++) {
      const size_t warp = round % 2 == 0 ? i : warps - 1 - i;
      do {
        warp_progress = machine.progress;
        for (size_t lane = 0; lane < kWarp; lane++) resume(warp * kWarp + lane);
      } while (machine.progress != warp_progress);
    }
    if (machine.progress == before) break;
  }
  for (const Fiber& fiber : machine.fibers)
    if (!fiber.finished) return false;
  return true;
}

}  // namespace emulation

inline int thread_in_block() { return emulation::current_fiber().thread; }
inline int threads_per_block() { return emulation::current_fiber().block->threads; }
inline unsigned block_x() { return unsigned(emulation::current_fiber().block->x); }
inline int block_y() { return emulation::current_fiber().block->y; }
inline Chunk* shared_memory() { return emulation::current_fiber().block->shared.data(); }

template <int kCount>
void shuffle_xor(const float (&values)[kCount], int mask, float (&others)[kCount]) {
  static_assert(kCount <= emulation::kMaxShuffled, "");
  emulation::Fiber& fiber = emulation::current_fiber();
  emulation::Block& block = *fiber.block;
  float* buffer = block.lanes.data() + (fiber.shuffles++ & 1) * block.threads * emulation::kMaxShuffled;
  std::memcpy(buffer + fiber.thread * emulation::kMaxShuffled, values, sizeof values);
  emulation::Barrier& warp = block.warps[fiber.thread / kWarp];
  emulation::wait(warp, emulation::arrive(warp));
  std::memcpy(others, buffer + (fiber.thread ^ mask) * emulation::kMaxShuffled, sizeof others);
}

inline void block_barrier() {
  emulation::Barrier& barrier = emulation::current_fiber().block->barrier;
  emulation::wait(barrier, emulation::arrive(barrier));
}
inline void cluster_arrive() {
  emulation::current_fiber().cluster_generation = emulation::arrive(emulation::machine.cluster);
}
inline void cluster_wait() {
  emulation::wait(emulation::machine.cluster, emulation::current_fiber().cluster_generation);
}

inline const float* map_shared_rank(const float* local, int rank) {
  emulation::Block& block = *emulation::current_fiber().block;
  const ptrdiff_t offset = reinterpret_cast<const char*>(local) - reinterpret_cast<const char*>(block.shared.data());
  return reinterpret_cast<const float*>(reinterpret_cast<const char*>(emulation::machine.blocks[rank].shared.data()) +
                                        offset);
}

// An offset into the block's shared memory.
typedef uint32_t SharedAddress;
inline SharedAddress shared_address(const Chunk* chunk) { return uint32_t((chunk - shared_memory()) * sizeof(Chunk)); }
inline char* at(SharedAddress address) { return reinterpret_cast<char*>(shared_memory()) + address; }

inline void copy_async(SharedAddress to, const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Chunk) != 0 || to % sizeof(Chunk) != 0) std::abort();  // as on a device
  emulation::current_fiber().copies.back().push_back({at(to), from});
}
inline Chunk load_shared(SharedAddress from) {
  Chunk chunk;
  std::memcpy(&chunk, at(from), sizeof chunk);
  return chunk;
}
inline void store_shared(SharedAddress to, uint32_t word) { std::memcpy(at(to), &word, sizeof word); }
inline void commit_copies() { emulation::current_fiber().copies.emplace_back(); }
template <int kPending>
void wait_for_copies() {
  auto& copies = emulation::current_fiber().copies;  // the last group is not committed yet
  for (; copies.size() > kPending + 1; copies.pop_front())
    for (const emulation::Copy& copy : copies.front()) std::memcpy(copy.to, copy.from, sizeof(Chunk));
}

inline char* kept(char* pointer) { return pointer; }

inline void store_streaming(void* to, const Chunk& chunk) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Chunk) != 0) std::abort();
  std::memcpy(to, &chunk, sizeof chunk);
}

inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float rounded_quotient(float a, float b) { return a / b; }

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// With the device's flush to 0, and a pseudo-random error of up to the device's 2^-22.
inline float power_of_two(float y) {
  if (y < -126.0f) return 0.0f;
  const float power = exp2f(y), noise = float(int32_t(as_bits(y) * 2654435761u)) * 0x1p-53f;
  return power + power * noise;
}

// With a pseudo-random error of up to the device's: 2^-22 of the result, or of 1 where that is less.
inline float log_of_two(float x) {
  const float exact = log2f(x), noise = float(int32_t(as_bits(x) * 2654435761u)) * 0x1p-53f;
  return exact + std::fmax(std::fabs(exact), 1.0f) * noise;
}

inline float half_to_float(uint32_t bits) {
  const int exponent = int(bits >> 10 & 31), fraction = int(bits & 1023);
  const float magnitude =
      exponent == 31 ? (fraction ? NAN : INFINITY)
                     : std::ldexp(float(exponent ? fraction + 1024 : fraction), (exponent ? exponent : 1) - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}
inline uint32_t float_to_half(float value) {
  const uint32_t sign = as_bits(value) >> 16 & 0x8000;
  const float magnitude = std::fabs(value);
  if (value != value) return sign | 0x7e00;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude == 0) return sign;
  int exponent;
  std::frexp(magnitude, &exponent);
  const int step = (exponent < -13 ? -13 : exponent) - 11;              // log2 of the spacing of halfs
  const int units = int(std::nearbyint(std::ldexp(magnitude, -step)));  // a carry goes into the exponent
  return sign | uint32_t(((step + 24) << 10) + units);
}
inline uint32_t float_to_bfloat16(float value) {
  const uint32_t bits = as_bits(value);
  if (value != value) return bits >> 16 | 0x40;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t half_pair(float low, float high) { return float_to_half(low) | float_to_half(high) << 16; }
inline uint32_t bfloat16_pair(float low, float high) { return float_to_bfloat16(low) | float_to_bfloat16(high) << 16; }

inline float larger(float a, float b) { return std::fmax(a, b); }
inline float larger_or_nan(float a, float b) { return a != a || b != b ? NAN : std::fmax(a, b); }
inline uint32_t larger_half_pair(uint32_t a, uint32_t b) {
  return half_pair(larger(half_to_float(a & 0xffff), half_to_float(b & 0xffff)),
                   larger(half_to_float(a >> 16), half_to_float(b >> 16)));
}
inline uint32_t larger_bfloat16_pair(uint32_t a, uint32_t b) {
  return bfloat16_pair(larger(as_float(a << 16), as_float(b << 16)),
                       larger(as_float(a & 0xffff0000u), as_float(b & 0xffff0000u)));
}
inline uint32_t larger_or_nan_bfloat16_pair(uint32_t a, uint32_t b) {
  return bfloat16_pair(larger_or_nan(as_float(a << 16), as_float(b << 16)),
                       larger_or_nan(as_float(a & 0xffff0000u), as_float(b & 0xffff0000u)));
}

namespace emulation {

// Runs a kernel over its grid, cluster by cluster. Returns nullptr, or the error.
template <class Arguments>
const char* launch(void (*kernel)(Arguments), Arguments arguments, int64_t blocks_x, int blocks_y, int threads,
                   int cluster, int64_t shared_bytes) {
  const int fibers = cluster * threads;
  if (machine.stack_bytes < fibers * kStackBytes) {
    machine.stack_bytes = fibers * kStackBytes;
    machine.stacks.reset(new char[machine.stack_bytes]);
  }
  struct Call {
    void (*kernel)(Arguments);
    Arguments arguments;
  } call{kernel, arguments};
  const auto body = [](void* context) {
    const Call* call = static_cast<const Call*>(context);
    call->kernel(call->arguments);
  };
  for (int64_t first = 0; first < blocks_x * blocks_y; first += cluster) {
    machine.blocks.assign(cluster, {});
    machine.fibers = std::vector<Fiber>(fibers);
    machine.cluster = {fibers};
    const size_t chunks = size_t(shared_bytes) / sizeof(Chunk);
    for (int rank = 0; rank < cluster; rank++) {
      Block& block = machine.blocks[rank];
      block.x = (first + rank) % blocks_x;
      block.y = int((first + rank) / blocks_x);
      block.threads = block.unfinished = threads;
      block.shared.assign(chunks + kGuardChunks, kUnwritten);
      block.barrier = {threads};
      block.warps.assign(threads / kWarp, Barrier{kWarp});
      block.lanes.assign(2 * threads * kMaxShuffled, NAN);
      for (int thread = 0; thread < threads; thread++) {
        Fiber& fiber = machine.fibers[rank * threads + thread];
        fiber.block = &block;
        fiber.thread = thread;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = machine.stacks.get() + (rank * threads + thread) * kStackBytes;
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
      }
    }
    if (!run_cluster(body, &call)) return "deadlock: threads wait at a barrier or shuffle that others do not reach";
    for (const Block& block : machine.blocks)
      for (size_t i = chunks; i < block.shared.size(); i++)
        for (uint32_t word : block.shared[i].word)
          if (word != kGuard) return "a thread wrote past the end of the block's shared memory";
  }
  return nullptr;
}

}  // namespace emulation
}  // namespace cuda
}  // namespace fastkd

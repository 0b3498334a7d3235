#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.h"

namespace fastkd {

#if defined(FASTKD_KNOWS_AVX512_BF16)
const bool converts_to_bfloat16 = (__builtin_cpu_init(), __builtin_cpu_supports("avx512bf16") != 0);
#endif

namespace {

struct Choice {
  const Kernels* kernels;
  std::string refusal;  // if kernels is nullptr
};

#if defined(__x86_64__)
// By the instruction itself: the compilers' __builtin_cpu_supports knows it from GCC 11 and Clang 17 on.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

Choice choose() {
  const char* environment = std::getenv("FASTKD_ISA");
  const std::string wanted = environment == nullptr ? "" : environment;
  const Kernels* runnable[3] = {&portable_kernels};  // fastest last
  int count = 1;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
    runnable[count++] = &avx2_kernels;
  if (count == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    runnable[count++] = &avx512_kernels;
#endif
  std::string allowed;
  for (int i = 0; i < count; i++) {
    if (wanted == runnable[i]->name) return {runnable[i], ""};
    allowed += (i == 0 ? "" : i + 1 < count ? ", " : " or ") + std::string(runnable[i]->name);
  }
  if (wanted.empty()) return {runnable[count - 1], ""};
  return {nullptr, "the environment's FASTKD_ISA is '" + wanted + "'; expected " + allowed +
                       ", which this processor runs, or nothing for the fastest"};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const Kernels& kernels() {
  if (choice().kernels == nullptr) throw std::runtime_error("fastkd_native: " + choice().refusal);
  return *choice().kernels;
}

const char* instruction_set_refusal() { return choice().kernels == nullptr ? choice().refusal.c_str() : nullptr; }

float* scratch(Scratch user, int64_t floats) {
  struct Buffer {
    float* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffers[kScratchUsers];
  Buffer& buffer = buffers[user];
  if (buffer.size < floats) {
    std::free(buffer.data);
    const size_t bytes = (size_t(floats) * sizeof(float) + 63) / 64 * 64;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, bytes));
    buffer.size = buffer.data == nullptr ? 0 : floats;
  }
  return buffer.data;
}

}  // namespace fastkd

// How a loss is described, passed to a kernel and found: what the losses of row_formulas.h have in common.
#pragma once

#include <cstdint>
#include <cstring>

#include "row_math.h"

namespace fastkd {

constexpr int kOptions = 8;
constexpr int kTerms = 4;

// A loss by its index in `Losses`, the needs of the call, and the options in the order of Loss::Options.
struct LossOptions {
  int32_t loss;
  uint32_t needs;
  float values[kOptions];
};

// Declares the options of a loss: a struct, and their names, which are compared with fastkd/ops/spec.py at load.
#define FASTKD_OPTIONS(...) \
  struct Options { \
    float __VA_ARGS__; \
  }; \
  static constexpr const char* kOptionNames = #__VA_ARGS__

// Always inlined: an out-of-line copy compiled for a newer instruction set could be linked into other source files.
#ifdef __CUDACC__
#define FASTKD_FORMULA static __host__ __device__ __forceinline__
#else
#define FASTKD_FORMULA static inline __attribute__((always_inline))
#endif

template <class Loss>
FASTKD_ROW_FUNCTION typename Loss::Options options_as(const LossOptions& options) {
  typename Loss::Options result;
  memcpy(&result, options.values, sizeof result);
  return result;
}

struct SoftmaxFamily {};
struct MixtureFamily {};
struct PointwiseFamily {};

// The values of needs & kCompiledNeeds that a loss of the softmax family can have.
template <unsigned... kNeeds>
struct VariantList {};

template <class... Loss>
struct LossList {};

// visit(Loss()) for the loss with this index; Result() if there is none.
template <class Result, class Visit, class... Loss>
inline __attribute__((always_inline)) Result with_loss(int32_t index, const Visit& visit, LossList<Loss...>) {
  Result result{};
  int32_t i = 0;
  (void)((i++ == index && (result = visit(Loss()), true)) || ...);
  return result;
}

}  // namespace fastkd

// Rows of logits of any dtype, as blocks of floats. Compiled per instruction set in its own namespace, like vector.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "vector.h"

namespace fastkd {
namespace FASTKD_ISA {

// ---- logits of any dtype ------------------------------------------------------------------------------------

FASTKD_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  uint32_t bits = (magnitude << 13) + (112u << 23);
  float value;
  if (magnitude >= 0x7c00) bits += 112u << 23;  // inf, NaN
  std::memcpy(&value, &bits, 4);
  if (magnitude < 0x0400) value = float(magnitude) * 5.9604644775390625e-8f;  // subnormal: in units of 2^-24
  std::memcpy(&bits, &value, 4);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

FASTKD_INLINE uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x47800000) return sign | 0x7c00;  // 2^16 and above, inf
  if (bits < 0x38800000) {                       // subnormal: adding 0.5 rounds to units of 2^-24
    float shifted;
    std::memcpy(&shifted, &bits, 4);
    shifted += 0.5f;
    std::memcpy(&bits, &shifted, 4);
    return sign | uint16_t(bits - 0x3f000000);
  }
  bits += 0xc8000fff + ((bits >> 13) & 1);  // exponent 127 -> 15, round to nearest even
  return sign | uint16_t(bits >> 13);
}

template <DType kType>
struct Element;

template <>
struct Element<DType::kFloat> {
  typedef float type;
  FASTKD_INLINE vf load(const float* p) { return FASTKD_ISA::load(p); }
  FASTKD_INLINE void store(float* p, vf x) { FASTKD_ISA::store(p, x); }
};

template <>
struct Element<DType::kBFloat16> {
  typedef uint16_t type;
  FASTKD_INLINE vf load(const uint16_t* p) {
#if defined(FASTKD_USE_AVX512)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(FASTKD_USE_AVX2)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    vh h;
    std::memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
  }
  FASTKD_INLINE void store(uint16_t* p, vf x) {
#if defined(FASTKD_USE_AVX512) && defined(FASTKD_KNOWS_AVX512_BF16)
    if (converts_to_bfloat16) {  // subnormal numbers become 0
      __m256i rounded_half;
      asm("vcvtneps2bf16 %1, %0" : "=v"(rounded_half) : "v"(x));
      _mm256_storeu_si256((__m256i*)p, rounded_half);
      return;
    }
#endif
    const vu bits = (vu)x;
    const vu nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const vu rounded_bits = (vu)select(x == x, (vf)nearest_even, (vf)(vu{} + 0x7fc0));
#if defined(FASTKD_USE_AVX2) && !defined(FASTKD_USE_AVX512)
    // Packed explicitly: the compiler's narrowing conversion adds redundant masks.
    const __m256i wide = (__m256i)rounded_bits;
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
#else
    const vh h = __builtin_convertvector(rounded_bits, vh);
    std::memcpy(p, &h, sizeof h);
#endif
  }
};

template <>
struct Element<DType::kHalf> {
  typedef uint16_t type;
  FASTKD_INLINE vf load(const uint16_t* p) {
#if defined(FASTKD_USE_AVX512)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(FASTKD_USE_AVX2)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    vf x;
    for (int i = 0; i < kLanes; i++) x[i] = half_to_float(p[i]);
    return x;
#endif
  }
  FASTKD_INLINE void store(uint16_t* p, vf x) {
#if defined(FASTKD_USE_AVX512)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(FASTKD_USE_AVX2)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < kLanes; i++) p[i] = float_to_half(x[i]);
#endif
  }
};

// Calls visit(Element<dtype>()).
template <class Visit>
FASTKD_INLINE auto with_element(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::kFloat: return visit(Element<DType::kFloat>());
    case DType::kBFloat16: return visit(Element<DType::kBFloat16>());
    case DType::kHalf: return visit(Element<DType::kHalf>());
    case DType::kLong: break;
  }
  __builtin_trap();  // Tensor::matrix() rejects other dtypes
}

template <class E>
FASTKD_INLINE typename E::type* element_at(const Matrix& matrix, int64_t row, int64_t offset) {
  return (typename E::type*)matrix.data + row_offset(matrix, row) + offset;
}

// ---- blocks: the only code that handles ragged row ends ----------------------------------------------------

// Logits are processed in blocks that fit into the L1 cache, converted to float and padded to whole cache lines.
// Padding is below masked classes and adds nothing to any sum.
constexpr int kBlock = 1024;
constexpr int kLine = 16;  // floats per cache line; loops prefetch once per line
// A block is summed in parts: a lane that added all of its 64 to 256 would round worse than eager torch, whose sums are
// pairwise, most of all where many addends are equal. 16 additions per lane of a part, 4 of narrow vectors.
constexpr int kPart = kLanes < 8 ? kLine : 16 * kLanes;
static_assert(kLine % kLanes == 0 && kPart % kLine == 0 && kBlock % kPart == 0, "each is whole ones of the last");

FASTKD_INLINE int end_of_part(int part, int padded) { return part + kPart < padded ? part + kPart : padded; }

FASTKD_INLINE int padded_to_line(int n) { return (n + kLine - 1) / kLine * kLine; }

// The number of logits in the block that starts at `offset`.
FASTKD_INLINE int block_size(int64_t classes, int64_t offset) {
  return int(classes - offset < kBlock ? classes - offset : kBlock);
}

// Memory to prefetch while the current block is computed. The hardware prefetcher stops at page boundaries, and a block
// of floats is a page: without this, arithmetic and memory accesses would not overlap.
struct Prefetch {
  const char* data;
  int width;
};

FASTKD_INLINE Prefetch prefetch_at(const Matrix& matrix, int64_t row, int64_t offset) {
  const int width = matrix.dtype == DType::kFloat ? 4 : 2;
  return {(const char*)matrix.data + (row_offset(matrix, row) + offset) * width, width};
}

// The logits of the next block, or of the next row's first block.
FASTKD_INLINE Prefetch prefetch_next_block(const Matrix& matrix, const Rows& rows, int64_t row, int64_t offset) {
  if (offset + kBlock < rows.classes) return prefetch_at(matrix, row, offset + kBlock);
  return prefetch_at(matrix, row + 1 < rows.count ? row + 1 : row, 0);
}

// Whether a loop over E prefetches at its element i: once per line of the cache, which holds two of ours of a half type.
template <class E>
FASTKD_INLINE bool starts_cache_line(int i) {
  return i % (64 / int(sizeof(typename E::type))) == 0;
}

FASTKD_INLINE void prefetch(const Prefetch& next, int i) { __builtin_prefetch(next.data + int64_t(i) * next.width); }
FASTKD_INLINE void prefetch_for_write(const Prefetch& next, int i) {
  __builtin_prefetch(next.data + int64_t(i) * next.width, 1);
}

// Copies n <= kBlock values to `to`, clamped from below to `lowest`, and updates the running maximum `largest`. Returns
// the padded length.
template <class E>
FASTKD_INLINE int load_block_as(const typename E::type* from, int n, float* to, float lowest, vf& largest) {
  const vf bound = broadcast(lowest);
  int i = 0;
  vf top = largest;
  for (; i + kLanes <= n; i += kLanes) {
    const vf x = at_least(E::load(from + i), bound);
    top = at_least(x, top);
    store(to + i, x);
  }
  if (i < n) {
    typename E::type tail[kLanes] = {};
    std::memcpy(tail, from + i, (n - i) * sizeof(tail[0]));
    store(to + i, at_least(E::load(tail), bound));
    for (int j = n - i; j < kLanes; j++) to[i + j] = excluded_below(lowest);
    top = at_least(load(to + i), top);
    i += kLanes;
  }
  largest = top;
  for (; i < padded_to_line(n); i += kLanes) store(to + i, broadcast(excluded_below(lowest)));
  return i;
}

FASTKD_INLINE int load_block(const Matrix& matrix, int64_t row, int64_t offset, int n, float* to, float lowest,
                             vf& largest) {
  return with_element(matrix.dtype, [&](auto element) __attribute__((always_inline)) {
    typedef decltype(element) E;
    return load_block_as<E>(element_at<E>(matrix, row, offset), n, to, lowest, largest);
  });
}

FASTKD_INLINE int load_block(const Matrix& matrix, int64_t row, int64_t offset, int n, float* to,
                             float lowest = kMasked) {
  vf unused = {};
  return load_block(matrix, row, offset, n, to, lowest, unused);
}

FASTKD_INLINE float first_logit(const Matrix& matrix, int64_t row) {
  float logit[kLine];
  load_block(matrix, row, 0, 1, logit);
  return logit[0];
}

// The sum of the first n entries of a block, relative to `origin`.
FASTKD_INLINE float sum_of_block(const float* block, int n, float origin = 0) {
  vf sums = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) sums += load(block + i) - broadcast(origin);
  float total = horizontal_sum(sums);
  for (; i < n; i++) total += block[i] - origin;
  return total;
}

// Writes the vectors value(0), value(kLanes), ... to n entries of a row.
template <class E, class Value>
FASTKD_INLINE void store_block_as(typename E::type* to, int n, const Value& value) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) E::store(to + i, value(i));
  if (i < n) {
    typename E::type tail[kLanes];
    E::store(tail, value(i));
    std::memcpy(to + i, tail, (n - i) * sizeof(tail[0]));
  }
}

template <class Value>
FASTKD_INLINE void store_block(const Matrix& matrix, int64_t row, int64_t offset, int n, const Value& value) {
  with_element(matrix.dtype, [&](auto element) __attribute__((always_inline)) {
    typedef decltype(element) E;
    store_block_as<E>(element_at<E>(matrix, row, offset), n, value);
  });
}

FASTKD_INLINE void fill_row(const Matrix& matrix, int64_t row, int64_t offset, int64_t n, float value) {
  const vf vector = broadcast(value);
  for (int64_t i = 0; i < n; i += kBlock)
    store_block(matrix, row, offset + i, block_size(n, i), [&](int) { return vector; });
}

// Fills loss, terms and gradient of a row with `value`: 0 if its weight is 0, NaN if its label is out of range.
FASTKD_INLINE void write_uncomputed(const Rows& rows, int64_t index, float value) {
  rows.losses[index] = value;
  for (int term = 0; term < 4 && rows.terms != nullptr; term++) rows.terms[term * rows.term_stride + index] = value;
  if (rows.gradient.data != nullptr) fill_row(rows.gradient, index, 0, rows.classes, value);
}

}  // namespace FASTKD_ISA
}  // namespace fastkd

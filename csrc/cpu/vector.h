// A vector of floats in the instruction set that the including file targets, and the functions of it that the
// kernels need. Compiled once for each instruction set, inside a namespace of its own (FASTKD_ISA), so that no
// function of a newer set can be linked into an older one's code; for the same reason no std template is used.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#define FASTKD_INLINE static inline __attribute__((always_inline))

namespace fastkd {
namespace FASTKD_ISA {

constexpr int kLanes = FASTKD_VECTOR_BYTES / 4;

typedef float vf __attribute__((vector_size(FASTKD_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(FASTKD_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(FASTKD_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(FASTKD_VECTOR_BYTES / 2)));

FASTKD_INLINE vf broadcast(float x) { return x - vf{}; }
FASTKD_INLINE vf as_float(vi x) { return (vf)x; }
FASTKD_INLINE vi as_int(vf x) { return (vi)x; }
FASTKD_INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
FASTKD_INLINE vf absolute(vf x) { return as_float(as_int(x) & 0x7fffffff); }

FASTKD_INLINE vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
FASTKD_INLINE void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }

// A NaN in `x` stays; one in `bound` must not occur.
FASTKD_INLINE vf at_least(vf x, vf bound) {
#if defined(FASTKD_USE_AVX512)
  return (vf)_mm512_max_ps((__m512)bound, (__m512)x);
#elif defined(FASTKD_USE_AVX2)
  return (vf)_mm256_max_ps((__m256)bound, (__m256)x);
#else
  return x < bound ? bound : x;
#endif
}

// The value as it is rounded: keeps the compiler from fusing the product into a later sum, which would leave
// a rounding error where two equal products must cancel to 0.
FASTKD_INLINE vf rounded(vf x) {
#if defined(__x86_64__) && defined(FASTKD_USE_AVX512)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

FASTKD_INLINE float horizontal_sum(vf x) {
  float sum = 0;
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) x[i] += x[i + width];
  sum = x[0];
  return sum;
}

FASTKD_INLINE float horizontal_max(vf x) {
  float largest = x[0];
  for (int i = 1; i < kLanes; i++) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// 1.5 * 2^23: a sum with it is rounded to an integer, which then stands in its low bits.
constexpr float kRounder = 12582912.0f;

// 2^y = scale + scale * minus_one for -127 <= y < 127: kept apart because 2^y - 1 is wanted without cancellation.
struct PowerOfTwo {
  vf scale, minus_one;
};

FASTKD_INLINE PowerOfTwo power_of_two(vf y) {
  constexpr float kBias = kRounder + 127.0f;  // the exponent of 1
  const vf shifted = rounded(y + kBias);
  const vf scale = as_float((vi)((vu)shifted << 23)), f = y - (shifted - kBias);
  // Least-maximum-error fit of (2^f - 1) / f, relative error 1e-8.
  const vf slope = 
      0.693147188f + f * (0.240226498f + f * (0.0555035722f +
      f * (0.00961823793f + f * (0.00133908498f + f * 0.000154035126f))));
  return {scale, f * slope};
}

// 2^(n / kSteps) from the low bits of n, exactly 0 at -127 * kSteps; and (2^(f / kSteps) - 1) / f for |f| <= 1/2, a fit
// of least maximum error in the power. A table of steps within an octave takes the place of two terms of it.
#if defined(FASTKD_USE_AVX2) || defined(FASTKD_USE_AVX512)
constexpr int kSteps = 8;

FASTKD_INLINE vf step_power(vi n) {
  // The bits of 2^(j / 8), less what a shift of j itself adds.
#define FASTKD_STEPS 0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7
#if defined(FASTKD_USE_AVX512)
  const vi table = {FASTKD_STEPS, FASTKD_STEPS};
  const vi step = (vi)_mm512_permutexvar_epi32((__m512i)n, (__m512i)table);
#else
  const vi table = {FASTKD_STEPS};
  const vi step = (vi)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)n);
#endif
#undef FASTKD_STEPS
  return as_float((vi)((vu)step + ((vu)n << 20)));  // of a NaN any bits come out: they may wrap
}

FASTKD_INLINE vf rest_slope(vf f) {  // error 2.7e-8
  return 0.0866434053f + f * (0.00375402556f + f * 0.000108391061f);
}
#else
constexpr int kSteps = 1;

FASTKD_INLINE vf step_power(vi n) { return as_float((vi)(((vu)n << 23) + 0x3f800000u)); }  // of a NaN any bits

FASTKD_INLINE vf rest_slope(vf f) {  // error 1.1e-7
  return 0.693147004f + f * (0.240222424f + f * (0.0555073395f + f * (0.00967151113f + f * 0.00132646528f)));
}
#endif

constexpr double kLog2E = 1.4426950408889634;

// e^(slope x) is 2^(factor x / kSteps), and 0 from `lowest` down.
struct Exponent {
  vf factor, lowest;
};

FASTKD_INLINE Exponent exponent_of(double slope) {
  const float factor = float(slope * kLog2E * kSteps);
  return {broadcast(factor), broadcast(-127.0f * kSteps / factor)};
}

// For slope * x < 88; exactly 0 below 2^-126, NaN stays.
FASTKD_INLINE vf exp_or_zero(vf x, const Exponent& exponent) {
  x = at_least(x, exponent.lowest);
  const vf shifted = rounded(x * exponent.factor + kRounder);
  const vf scale = step_power(as_int(shifted)), rest = x * exponent.factor - (shifted - kRounder);
  return scale + (scale * rest) * rest_slope(rest);
}

FASTKD_INLINE vf exp_or_zero(vf x) { return exp_or_zero(x, exponent_of(1.0)); }

// 2 atanh(w) = log((1 + w) / (1 - w)) for |w| <= 1/3, relative error 4e-9.
FASTKD_INLINE vf twice_atanh(vf w) {
  const vf s = w * w;
  return w * (2.0f + s * (0.666663094f + s * (0.400251554f + s * (0.279569799f + s * 0.281950615f))));
}

// x = 2^exponent * fraction with a fraction from sqrt(1/2) to sqrt(2), for x > 0 in the normal range.
struct Halves {
  vf exponent, fraction;
};

FASTKD_INLINE Halves halves_of(vf x) {
  const vu bits = (vu)x, above = bits - 0x3f3504f3u;
  return {__builtin_convertvector((vi)above >> 23, vf), (vf)(bits - (above & 0xff800000u))};
}

// log(x) for x > 0 in the normal range.
FASTKD_INLINE vf natural_log(vf x) {
  const Halves halves = halves_of(x);  // (y - 1) / (y + 1) is at most 0.172
  const vf y = halves.fraction;
  return twice_atanh((y - 1.0f) / (y + 1.0f)) + halves.exponent * 0.693147181f;
}

// ---- logits of any dtype ------------------------------------------------------------------------------------

FASTKD_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  uint32_t bits = (magnitude << 13) + (112u << 23);
  float value;
  if (magnitude >= 0x7c00) bits += 112u << 23;  // inf, NaN
  std::memcpy(&value, &bits, 4);
  if (magnitude < 0x0400) value = float(magnitude) * 5.9604644775390625e-8f;  // subnormal: 2^-24 a step
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
  if (bits < 0x38800000) {                        // subnormal: adding 0.5 leaves the rounded bits below
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
    const vu bits = (vu)x;
    const vu nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const vu rounded_bits = (vu)select(x == x, (vf)nearest_even, (vf)(vu{} + 0x7fc0));
#if defined(FASTKD_USE_AVX2) && !defined(FASTKD_USE_AVX512)
    // Two halves packed: the compiler's own narrowing masks what is known to be narrow.
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

// Calls visit(Element<...>()) with the element of a dtype.
template <class Visit>
FASTKD_INLINE auto with_element(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::kFloat: return visit(Element<DType::kFloat>());
    case DType::kBFloat16: return visit(Element<DType::kBFloat16>());
    case DType::kHalf: return visit(Element<DType::kHalf>());
    case DType::kLong: break;
  }
  __builtin_trap();  // whoever made the Matrix has let this dtype in
}

template <class E>
FASTKD_INLINE typename E::type* element_at(const Matrix& matrix, int64_t row, int64_t offset) {
  return (typename E::type*)matrix.data + row_offset(matrix, row) + offset;
}

// ---- blocks: the only code that knows of a row's ragged end ------------------------------------------------

// Logits are worked on in blocks that stay in the first-level cache, converted to float and padded to whole
// lines; a padded entry is a masked class, which adds nothing to any sum.
constexpr int kBlock = 1024;
// Floats of a cache line: a loop that fetches memory ahead does it once for so many.
constexpr int kLine = 16;
static_assert(kLine % kLanes == 0 && kBlock % kLine == 0, "a line is whole vectors");

FASTKD_INLINE int padded_to_line(int n) { return (n + kLine - 1) / kLine * kLine; }

// How many of the `classes` logits are in the block that starts at `offset`.
FASTKD_INLINE int block_size(int64_t classes, int64_t offset) {
  return int(classes - offset < kBlock ? classes - offset : kBlock);
}

// The memory that is wanted after the present block. It is fetched while this one is computed: the processor's own
// prefetching stops at each page, which a block fills, and arithmetic and memory would take turns.
struct Ahead {
  const char* data;
  int width;
};

FASTKD_INLINE Ahead ahead_at(const Matrix& matrix, int64_t row, int64_t offset) {
  const int width = matrix.dtype == DType::kFloat ? 4 : 2;
  return {(const char*)matrix.data + (row_offset(matrix, row) + offset) * width, width};
}

// The logits of the next block, or of the next row's first.
FASTKD_INLINE Ahead ahead_of_block(const Matrix& matrix, const Rows& rows, int64_t row, int64_t offset) {
  if (offset + kBlock < rows.classes) return ahead_at(matrix, row, offset + kBlock);
  return ahead_at(matrix, row + 1 < rows.count ? row + 1 : row, 0);
}

FASTKD_INLINE void fetch(const Ahead& ahead, int i) { __builtin_prefetch(ahead.data + int64_t(i) * ahead.width); }
FASTKD_INLINE void fetch_to_write(const Ahead& ahead, int i) {
  __builtin_prefetch(ahead.data + int64_t(i) * ahead.width, 1);
}

// Copies n <= kBlock values to `to`, raising what is below `lowest` to it, and `largest` to the largest of them;
// returns the padded length.
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
    for (int j = n - i; j < kLanes; j++) to[i + j] = lowest;
    top = at_least(load(to + i), top);
    i += kLanes;
  }
  largest = top;
  for (; i < padded_to_line(n); i += kLanes) store(to + i, bound);
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

// The sum of a loaded block's n entries relative to `origin`, without the padding.
FASTKD_INLINE float sum_of_block(const float* block, int n, float origin = 0) {
  vf sums = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) sums += load(block + i) - broadcast(origin);
  float total = horizontal_sum(sums);
  for (; i < n; i++) total += block[i] - origin;
  return total;
}

// Writes value(i) for i = 0, kLanes, ... to the n entries of a row from `offset` on, in the matrix's dtype.
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

// Loss, terms and gradient of a row that has none: 0 for one left out, NaN for one that cannot be computed.
FASTKD_INLINE void write_whole_row(const Rows& rows, int64_t index, float value) {
  rows.losses[index] = value;
  for (int term = 0; term < 4 && rows.terms != nullptr; term++) rows.terms[term * rows.term_stride + index] = value;
  if (rows.gradient.data != nullptr) fill_row(rows.gradient, index, 0, rows.classes, value);
}

}  // namespace FASTKD_ISA
}  // namespace fastkd

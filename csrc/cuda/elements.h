// Logits of any dtype, processed in vectors of eight, in float32.
#pragma once

#include "arguments.h"
#include "device.h"

namespace fastkd {
namespace cuda {

constexpr int kVector = 8;

FASTKD_DEVICE int size_of(DType dtype) { return dtype == DType::kFloat ? 4 : 2; }    // bytes
FASTKD_DEVICE int chunks_of(DType dtype) { return dtype == DType::kFloat ? 2 : 1; }  // per vector

// A row of a matrix. Its vectors start `phase` columns before the row, on 16-byte boundaries wherever the row starts;
// the first and last vector may be partial. In dense tensors student, teacher and gradient have the same phase,
// whatever their dtypes.
struct RowPointer {
  char* data;
  DType dtype;
  bool aligned;
};

FASTKD_DEVICE RowPointer row_of(const Matrix& matrix, int64_t row) {
  return {static_cast<char*>(matrix.data) + row_offset(matrix, row) * size_of(matrix.dtype), matrix.dtype, false};
}

// The distance in columns from the last vector boundary to the start of the row.
FASTKD_DEVICE int phase_of(const RowPointer& row) {
  return int(reinterpret_cast<uintptr_t>(row.data) >> (row.dtype == DType::kFloat ? 2 : 1)) & (kVector - 1);
}

FASTKD_DEVICE bool is_aligned(const RowPointer& row, int phase) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(row.data);
  const uintptr_t start = address - uintptr_t(phase) * size_of(row.dtype);
  return start % sizeof(Chunk) == 0;
}

FASTKD_DEVICE bool is_whole(int column, int classes) { return column >= 0 && column + kVector <= classes; }
FASTKD_DEVICE bool is_inside(int column, int classes) { return unsigned(column) < unsigned(classes); }

FASTKD_DEVICE uint32_t minus_infinity(DType dtype) {
  return dtype == DType::kFloat ? 0xff800000u : dtype == DType::kBFloat16 ? 0xff80u : 0xfc00u;
}

// Copies a vector to shared memory, its chunks `stride` chunks apart; -inf outside the row.
FASTKD_DEVICE void fetch_vector(const RowPointer& row, int column, int classes, Chunk* to, int stride) {
  const int size = size_of(row.dtype);
  const char* from = row.data + int64_t(column) * size;
  if (row.aligned && is_whole(column, classes)) {
    copy_async(to, from);
    if (row.dtype == DType::kFloat) copy_async(to + stride, from + sizeof(Chunk));
    return;
  }
  uint32_t bits[kVector];
#pragma unroll
  for (int i = 0; i < kVector; i++) {
    bits[i] = minus_infinity(row.dtype);
    if (!is_inside(column + i, classes)) continue;
    if (row.dtype == DType::kFloat) bits[i] = reinterpret_cast<const uint32_t*>(from)[i];
    else bits[i] = reinterpret_cast<const uint16_t*>(from)[i];
  }
  if (row.dtype == DType::kFloat) {
    to[0] = {bits[0], bits[1], bits[2], bits[3]};
    to[stride] = {bits[4], bits[5], bits[6], bits[7]};
  } else {
    to[0] = {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16, bits[6] | bits[7] << 16};
  }
}

// Reads a fetched vector, clamped from below to `lowest`; propagates NaN.
FASTKD_DEVICE void read_vector(const Chunk* from, int stride, DType dtype, float lowest, float (&values)[kVector]) {
  const Chunk first = from[0];
  if (dtype == DType::kFloat) {
    const Chunk second = from[stride];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      values[i] = as_float(first.word[i]);
      values[i + 4] = as_float(second.word[i]);
    }
  } else if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      values[2 * i] = as_float(first.word[i] << 16);
      values[2 * i + 1] = as_float(first.word[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      values[2 * i] = half_to_float(first.word[i] & 0xffffu);
      values[2 * i + 1] = half_to_float(first.word[i] >> 16);
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; i++) values[i] = values[i] < lowest ? lowest : values[i];
}

// A logit that is loaded early and converted later, so that the first pass hides the latency of the load.
struct LoadedLogit {
  uint32_t bits;
  DType dtype;
};

FASTKD_DEVICE LoadedLogit load_logit(const RowPointer& row, int64_t column) {
  if (row.dtype == DType::kFloat) return {reinterpret_cast<const uint32_t*>(row.data)[column], row.dtype};
  return {reinterpret_cast<const uint16_t*>(row.data)[column], row.dtype};
}

FASTKD_DEVICE float value_of(const LoadedLogit& logit) {
  const float value = logit.dtype == DType::kFloat      ? as_float(logit.bits)
                      : logit.dtype == DType::kBFloat16 ? as_float(logit.bits << 16)
                                                        : half_to_float(logit.bits);
  return value < kMasked ? kMasked : value;
}

FASTKD_DEVICE void store_logit(const RowPointer& row, int64_t column, float value) {
  if (row.dtype == DType::kFloat) {
    reinterpret_cast<float*>(row.data)[column] = value;
    return;
  }
  const uint32_t bits = row.dtype == DType::kBFloat16 ? float_to_bfloat16(value) : float_to_half(value);
  reinterpret_cast<uint16_t*>(row.data)[column] = uint16_t(bits);
}

FASTKD_DEVICE void store_vector(const RowPointer& row, int column, int classes, const float (&values)[kVector]) {
  char* to = row.data + int64_t(column) * size_of(row.dtype);
  const bool vectorized = row.aligned && is_whole(column, classes);
  if (row.dtype == DType::kFloat) {
    if (vectorized) {
      store_streaming(to, {as_bits(values[0]), as_bits(values[1]), as_bits(values[2]), as_bits(values[3])});
      store_streaming(to + sizeof(Chunk),
                      {as_bits(values[4]), as_bits(values[5]), as_bits(values[6]), as_bits(values[7])});
      return;
    }
#pragma unroll
    for (int i = 0; i < kVector; i++)
      if (is_inside(column + i, classes)) reinterpret_cast<float*>(to)[i] = values[i];
    return;
  }
  uint32_t bits[kVector];
#pragma unroll
  for (int i = 0; i < kVector; i++)
    bits[i] = row.dtype == DType::kBFloat16 ? float_to_bfloat16(values[i]) : float_to_half(values[i]);
  if (vectorized) {
    store_streaming(to, {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16,
                         bits[6] | bits[7] << 16});
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; i++)
    if (is_inside(column + i, classes)) reinterpret_cast<uint16_t*>(to)[i] = uint16_t(bits[i]);
}

}  // namespace cuda
}  // namespace fastkd

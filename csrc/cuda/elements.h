// Logits, processed in vectors of eight, in float32.
#pragma once

#include "arguments.h"
#include "device.h"

namespace fastkd {
namespace cuda {

constexpr int kVector = 8;

// The dtype of all matrices of a kernel, known when it is compiled.
template <DType kType>
struct Fixed {
  static constexpr bool kPairs = kType != DType::kFloat;             // two logits per word, compared together
  static constexpr bool kBFloat16Pairs = kType == DType::kBFloat16;  // and clamped: kMasked is no half
  FASTKD_DEVICE Fixed(DType) {}
  static FASTKD_DEVICE constexpr DType dtype() { return kType; }
};

// A dtype known at run time only: for matrices of different dtypes.
struct Varying {
  static constexpr bool kPairs = false, kBFloat16Pairs = false;
  FASTKD_DEVICE Varying(DType type) : type(type) {}
  FASTKD_DEVICE DType dtype() const { return type; }
  DType type;
};

FASTKD_DEVICE constexpr int size_of(DType dtype) { return dtype == DType::kFloat ? 4 : 2; }    // bytes
FASTKD_DEVICE constexpr int chunks_of(DType dtype) { return dtype == DType::kFloat ? 2 : 1; }  // per vector

// Code for several dtypes at once takes more registers.
template <class Type>
constexpr int kRegisters = k80Registers;
template <>
constexpr int kRegisters<Varying> = k128Registers;

// A row of a matrix. Its vectors start `phase` columns before the row, on 16-byte boundaries wherever the row starts;
// the first and last vector may be partial. In dense tensors student, teacher and gradient have the same phase,
// whatever their dtypes.
template <class Type>
struct RowPointer {
  char* data;
  Type type;
  // A vector is accessed in chunks if its column is below this, as an unsigned number: if it is entirely inside the
  // row, and the row's vectors are aligned.
  unsigned whole_end;

  FASTKD_DEVICE char* at(int64_t column) const { return data + column * size_of(type.dtype()); }
  FASTKD_DEVICE bool is_whole(int column) const { return unsigned(column) < whole_end; }
};

template <class Type>
FASTKD_DEVICE RowPointer<Type> row_of(const Matrix& matrix, int64_t row) {
  const Type type(matrix.dtype);
  return {kept(static_cast<char*>(matrix.data) + row_offset(matrix, row) * size_of(type.dtype())), type, 0};
}

// The distance in columns from the last vector boundary to the start of the row.
template <class Type>
FASTKD_DEVICE int phase_of(const RowPointer<Type>& row) {
  return int(reinterpret_cast<uintptr_t>(row.data) >> (row.type.dtype() == DType::kFloat ? 2 : 1)) & (kVector - 1);
}

// A row with vectors at this phase.
template <class Type>
FASTKD_DEVICE RowPointer<Type> row_of(const Matrix& matrix, int64_t index, int phase, int classes) {
  RowPointer<Type> row = row_of<Type>(matrix, index);
  const bool aligned = reinterpret_cast<uintptr_t>(row.at(-phase)) % sizeof(Chunk) == 0;
  row.whole_end = aligned && classes >= kVector ? unsigned(classes - kVector + 1) : 0u;
  return row;
}

FASTKD_DEVICE bool is_inside(int column, int classes) { return unsigned(column) < unsigned(classes); }

FASTKD_DEVICE bool is_vector_inside(int column, int classes) { return column >= 0 && column + kVector <= classes; }

// visit(i) for each column + i of a vector that is inside the row.
template <class Visit>
FASTKD_DEVICE void each_inside(int column, int classes, const Visit& visit) {
  if (is_vector_inside(column, classes)) {
#pragma unroll
    for (int i = 0; i < kVector; i++) visit(i);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; i++)
      if (is_inside(column + i, classes)) visit(i);
  }
}

FASTKD_DEVICE constexpr uint32_t minus_infinity(DType dtype) {
  return dtype == DType::kFloat ? 0xff800000u : dtype == DType::kBFloat16 ? 0xff80u : 0xfc00u;
}

// A logit that is loaded early and converted later, so that the first pass hides the latency of the load.
template <class Type>
FASTKD_DEVICE uint32_t load_logit(const RowPointer<Type>& row, int64_t column) {
  return row.type.dtype() == DType::kFloat ? *reinterpret_cast<const uint32_t*>(row.at(column))
                                           : *reinterpret_cast<const uint16_t*>(row.at(column));
}

FASTKD_DEVICE float to_float(uint32_t bits, DType dtype) {
  return dtype == DType::kFloat      ? as_float(bits)
         : dtype == DType::kBFloat16 ? as_float(bits << 16)
                                     : half_to_float(bits);
}

// Clamped from below to kMasked; propagates NaN.
template <class Type>
FASTKD_DEVICE float value_of(uint32_t logit, Type type) {
  return larger_or_nan(to_float(logit, type.dtype()), kMasked);
}

template <class Type>
FASTKD_DEVICE void store_logit(const RowPointer<Type>& row, int64_t column, float value) {
  if (row.type.dtype() == DType::kFloat) {
    *reinterpret_cast<float*>(row.at(column)) = value;
  } else {
    const uint32_t pair = row.type.dtype() == DType::kBFloat16 ? bfloat16_pair(value, value) : half_pair(value, value);
    *reinterpret_cast<uint16_t*>(row.at(column)) = uint16_t(pair);
  }
}

// The bits of a logit; -inf outside the row.
template <class Type>
FASTKD_DEVICE uint32_t bits_at(const RowPointer<Type>& row, int column, int classes) {
  return is_inside(column, classes) ? load_logit(row, column) : minus_infinity(row.type.dtype());
}

// Copies a whole vector to shared memory asynchronously, its chunks `stride` bytes apart.
template <class Type>
FASTKD_DEVICE void copy_vector(const RowPointer<Type>& row, int column, SharedAddress to, int stride) {
  const char* from = row.at(column);
  copy_async(to, from);
  if (row.type.dtype() == DType::kFloat) copy_async(to + stride, from + sizeof(Chunk));
}

// The same for any vector, at once; -inf outside the row.
template <class Type>
FASTKD_DEVICE void gather_vector(const RowPointer<Type>& row, int column, int classes, SharedAddress to, int stride) {
  if (row.type.dtype() == DType::kFloat) {
#pragma unroll 2
    for (int i = 0; i < kVector; i++) store_shared(to + i / 4 * stride + i % 4 * 4, bits_at(row, column + i, classes));
  } else {
#pragma unroll 2
    for (int i = 0; i < kVector / 2; i++)
      store_shared(to + 4 * i, bits_at(row, column + 2 * i, classes) | bits_at(row, column + 2 * i + 1, classes) << 16);
  }
}

FASTKD_DEVICE float largest_of(const float (&z)[kVector], float bound) {
  const float low = larger(larger(z[0], z[1]), larger(z[2], z[3])),
              high = larger(larger(z[4], z[5]), larger(z[6], z[7]));
  return larger(larger(low, high), bound);
}

constexpr uint32_t kMaskedPair = 0xf180f180u;  // kMasked twice, in bfloat16

// A bound in the form that Vector::exceeds() takes, in pairs rounded to the dtype.
template <class Type>
FASTKD_DEVICE uint32_t bound_of(float bound) {
  if constexpr (Type::kPairs) {
    return Type::dtype() == DType::kBFloat16 ? bfloat16_pair(bound, bound) : half_pair(bound, bound);
  } else {
    return as_bits(bound);
  }
}

// A fetched vector in float32. With kClamps, clamped from below to kMasked. Propagates NaN.
template <class Type, bool kClamps = true>
struct Vector {
  FASTKD_DEVICE Vector(SharedAddress from, int stride, Type type) {
    const DType dtype = type.dtype();
    first_ = load_shared(from);
    if (dtype == DType::kFloat) {
      const Chunk second = load_shared(from + stride);
#pragma unroll
      for (int i = 0; i < 4; i++) z[i] = as_float(first_.word[i]), z[i + 4] = as_float(second.word[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (kClampsPairs) first_.word[i] = larger_or_nan_bfloat16_pair(first_.word[i], kMaskedPair);
        z[2 * i] = to_float(first_.word[i] & 0xffffu, dtype);
        z[2 * i + 1] = to_float(first_.word[i] >> 16, dtype);
      }
    }
    if (kClamps && !kClampsPairs) {
#pragma unroll
      for (int i = 0; i < kVector; i++) z[i] = larger_or_nan(z[i], kMasked);
    }
  }

  // Whether a logit exceeds the bound; at times also if only a NaN does, or none.
  FASTKD_DEVICE bool exceeds(uint32_t bound) const {
    if constexpr (Type::kPairs) {
      const auto larger_pair = [](uint32_t a, uint32_t b) {
        return Type::dtype() == DType::kBFloat16 ? larger_bfloat16_pair(a, b) : larger_half_pair(a, b);
      };
      const uint32_t* pair = first_.word;
      const uint32_t largest = larger_pair(larger_pair(pair[0], pair[1]), larger_pair(pair[2], pair[3]));
      return larger_pair(largest, bound) != bound;
    } else {
      return largest_of(z, as_float(bound)) > as_float(bound);
    }
  }

  float z[kVector];

 private:
  static constexpr bool kClampsPairs = kClamps && Type::kBFloat16Pairs;
  Chunk first_;  // of 16-bit logits, all
};

// Columns outside the row count 0 in sums of exponentials.
template <class Type>
FASTKD_DEVICE void exclude_outside(int column, int classes, float masked, Vector<Type>& student,
                                   Vector<Type>& teacher) {
  if (is_vector_inside(column, classes)) return;
#pragma unroll
  for (int i = 0; i < kVector; i++)
    if (!is_inside(column + i, classes)) student.z[i] = teacher.z[i] = excluded_below(masked);
}

// Of a row in which the vector is whole.
template <class Type>
FASTKD_DEVICE void store_whole_vector(const RowPointer<Type>& row, int column, const float (&values)[kVector]) {
  const DType dtype = row.type.dtype();
  char* to = row.at(column);
  Chunk chunk;
  if (dtype == DType::kFloat) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int i = 0; i < 4; i++) chunk.word[i] = as_bits(values[4 * half + i]);
      store_streaming(to + half * sizeof(Chunk), chunk);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float low = values[2 * i], high = values[2 * i + 1];
      chunk.word[i] = dtype == DType::kBFloat16 ? bfloat16_pair(low, high) : half_pair(low, high);
    }
    store_streaming(to, chunk);
  }
}

template <class Type>
FASTKD_DEVICE void store_vector(const RowPointer<Type>& row, int column, int classes, const float (&values)[kVector]) {
  if (row.is_whole(column)) return store_whole_vector(row, column, values);
#pragma unroll
  for (int i = 0; i < kVector; i++)
    if (is_inside(column + i, classes)) store_logit(row, column + i, values[i]);
}

}  // namespace cuda
}  // namespace fastkd

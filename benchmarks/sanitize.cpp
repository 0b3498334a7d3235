// Drives the CPU kernels under sanitizers; see sanitize.py. Every buffer is a separate allocation of exactly the size
// that the arguments imply, so that an access one element past the end is detected.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace fastkd {
namespace {

struct Case {
  LossOptions options;
};
#include "sanitize_cases.inc"  // kCases: those of fastkd/ops/spec.py
const DType kDTypes[] = {DType::kFloat, DType::kBFloat16, DType::kHalf};

int64_t width_of(DType dtype) { return dtype == DType::kFloat ? 4 : 2; }

// An allocation of exactly `size` bytes, filled with 0xff: NaN in every dtype.
struct Buffer {
  explicit Buffer(int64_t size) : data(static_cast<char*>(std::malloc(size_t(size)))), bytes(size) {
    std::memset(data, 0xff, size_t(size));
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  char* data;
  int64_t bytes;
};

// Layout of the rows: dense, with gaps, broadcast, or with two leading dimensions.
enum class Layout { kDense, kGap, kShared, kTwo };

Matrix matrix_of(Layout layout, int64_t rows, int64_t classes, DType dtype, int64_t& elements) {
  Matrix matrix;
  matrix.dtype = dtype;
  matrix.stride = layout == Layout::kShared ? 0 : layout == Layout::kGap ? classes + 3 : classes;
  elements = (rows - 1) * matrix.stride + classes;
  if (layout == Layout::kTwo) {
    matrix.inner = 2;
    matrix.outer_stride = 3 * classes;
    elements = (rows - 1) / 2 * matrix.outer_stride + (rows - 1) % 2 * classes + classes;
  }
  return matrix;
}

// The bits of a random logit. Kinds: ordinary, some -inf, some NaN, constant, largest magnitude, some +inf.
uint32_t bits_of(DType dtype, int kind, uint32_t& state) {
  state = state * 1664525u + 1013904223u;
  const float ordinary = (float(state >> 8) / 8388608.0f - 1.0f) * 6.0f;
  float value = ordinary;
  if (kind == 1) value = (state >> 20 & 7) == 0 ? -INFINITY : ordinary;
  if (kind == 2) value = (state >> 20 & 63) == 0 ? NAN : ordinary;
  if (kind == 3) value = 7.3f;
  if (kind == 4) value = dtype == DType::kHalf ? std::copysign(65504.0f, ordinary) : std::copysign(3.0e38f, ordinary);
  if (kind == 5) value = (state >> 20 & 63) == 0 ? INFINITY : ordinary;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == DType::kFloat) return bits;
  if (dtype == DType::kBFloat16) return bits >> 16;
  // Approximately float16: sign, exponent and the leading bits of the fraction.
  const uint32_t sign = bits >> 16 & 0x8000;
  if (std::isnan(value)) return sign | 0x7e00;
  if (std::isinf(value)) return sign | 0x7c00;
  const int exponent = int(bits >> 23 & 255) - 112;
  return exponent <= 0 ? sign : exponent > 30 ? sign | 0x7bff : sign | uint32_t(exponent) << 10 | (bits >> 13 & 1023);
}

void fill(const Matrix& matrix, int64_t rows, int64_t classes, int kind, uint32_t seed) {
  for (int64_t row = 0; row < rows; row++)
    for (int64_t i = 0; i < classes; i++) {
      const uint32_t bits = bits_of(matrix.dtype, kind, seed);
      const int64_t at = row_offset(matrix, row) + i;
      if (matrix.dtype == DType::kFloat) static_cast<uint32_t*>(matrix.data)[at] = bits;
      else static_cast<uint16_t*>(matrix.data)[at] = uint16_t(bits);
    }
}

void run_serially(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
  for (int64_t i = 0; i < count; i++) body(i, i + 1, context);
}

int64_t calls = 0;

struct Choice {
  const Kernels* kernels;
  const Case* loss;
  DType student, teacher;
  int64_t rows, classes;
  Layout layout;
  int kind, parts;
  bool weighted, labelled, with_gradient, with_terms;
};

void call(const Choice& choice, const std::string& fault) {
  const int64_t rows = choice.rows, classes = choice.classes;
  int64_t student_elements, teacher_elements, gradient_elements;
  Matrix student = matrix_of(choice.layout, rows, classes, choice.student, student_elements);
  Matrix teacher = matrix_of(choice.layout, rows, classes, choice.teacher, teacher_elements);
  Matrix gradient = matrix_of(Layout::kDense, rows, classes, choice.student, gradient_elements);
  Buffer s(student_elements * width_of(choice.student)), t(teacher_elements * width_of(choice.teacher));
  Buffer g(gradient_elements * width_of(choice.student)), losses(4 * rows), terms(4 * kTerms * rows);
  Buffer weights(4 * (2 * rows - 1)), labels(8 * (3 * rows - 2));
  student.data = s.data, teacher.data = t.data;
  fill(student, rows, classes, choice.kind, 1);
  fill(teacher, rows, classes, choice.kind, 2);
  Rows arguments;
  std::memset(&arguments, 0, sizeof arguments);
  arguments.student = student, arguments.teacher = teacher, arguments.gradient = Matrix{};
  if (choice.with_gradient) gradient.data = g.data, arguments.gradient = gradient;
  arguments.count = rows, arguments.classes = fault == "row" ? classes + 1 : classes;
  arguments.scale = 0.5f;
  arguments.losses = reinterpret_cast<float*>(losses.data);
  arguments.terms = choice.with_terms ? reinterpret_cast<float*>(terms.data) : nullptr;
  arguments.term_stride = rows;
  for (int64_t row = 0; row < rows; row++) {
    reinterpret_cast<float*>(weights.data)[2 * row] = row == 1 ? 0.0f : 0.7f;
    reinterpret_cast<int64_t*>(labels.data)[3 * row] = row == 2 ? classes : row * 7919 % classes;
  }
  if (choice.weighted) arguments.row_weight = reinterpret_cast<float*>(weights.data), arguments.row_weight_stride = 2;
  if (fault == "weight") arguments.row_weight_stride = 4;
  if (choice.labelled) arguments.target = reinterpret_cast<int64_t*>(labels.data), arguments.target_stride = 3;
  const LossOptions& options = choice.loss->options;
  if (!choice.kernels->computes(options)) std::abort();
  if (choice.parts > 1) choice.kernels->row_loss_in_parts(arguments, options, choice.parts, run_serially);
  else choice.kernels->row_loss(arguments, options, 0, rows);
  if (choice.with_gradient)
    choice.kernels->scale_rows(gradient, reinterpret_cast<float*>(losses.data), 1, classes, 0, rows);
  calls++;
}

void run(const Kernels* kernels, bool quick, const std::string& fault) {
  const std::vector<int64_t> few = {2, 17, 1000, 1030},
                             many = {2,  3,   7,    8,    9,    15,   16,   17,   31,   33,   63,  64,
                                     65, 100, 1000, 1023, 1024, 1025, 1039, 2047, 2048, 2100, 4099};
  int counter = 0;
  for (const Case& loss : kCases)
    for (DType student : kDTypes)
      for (DType teacher : kDTypes)
        for (int64_t classes : quick ? few : many)
          for (Layout layout : {Layout::kDense, Layout::kGap, Layout::kShared, Layout::kTwo})
            for (int kind = 0; kind < 6; kind++) {
              if (quick && (student != teacher || kind == 5) && (counter++ & 7) != 0) continue;
              const bool labelled = (loss.options.needs & kLabelled) != 0;
              // The other arguments cycle through their combinations.
              for (int more = 0; more < (quick ? 2 : 4); more++, counter++) {
                const int parts = classes > 1024 && counter % 3 == 0 ? 2 : 1;
                call({kernels, &loss, student, teacher, 5, classes, layout, kind, parts, (counter & 1) == 0, labelled,
                      (counter & 2) == 0 || more == 0, (counter & 4) == 0},
                     fault);
              }
            }
}

}  // namespace
}  // namespace fastkd

int main(int count, char** arguments) {
  using namespace fastkd;
  const bool quick = count > 1 && std::string(arguments[1]) == "quick";
  const std::string fault = count > 2 ? arguments[2] : "";
  volatile int shift = fault == "arithmetic" ? 40 : 4;
  volatile int shifted = 1 << shift;
  (void)shifted;
  std::vector<const Kernels*> sets = {&portable_kernels};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    sets.push_back(&avx2_kernels);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    sets.push_back(&avx512_kernels);
#endif
  for (const Kernels* kernels : sets) {
    const int64_t before = calls;
    run(kernels, quick, fault);
    std::printf("sanitize: %s, %lld calls, nothing found\n", kernels->name, (long long)(calls - before));
  }
  return 0;
}

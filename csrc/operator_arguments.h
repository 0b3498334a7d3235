// The arguments of the operators: unpacked from torch's stack, and checked before their memory is accessed. Included
// only by bindings.cpp.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cuda/launch.h"
#include "torch_abi.h"

namespace fastkd {
namespace {

void check(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(std::string("fastkd_native: ") + message);
}

int64_t width_of(DType dtype) {
  switch (dtype) {
    case DType::kHalf:
    case DType::kBFloat16: return 2;
    case DType::kFloat: return 4;
    case DType::kLong: return 8;
  }
  throw std::runtime_error("fastkd_native: unsupported dtype");
}

// An owned tensor argument. Memory is accessed through data() only, which checks the storage: a tensor may have
// elements without memory behind them. A tensor without elements represents None.
class Tensor {
 public:
  // `index`: position in a list argument, or -1.
  Tensor(StableIValue value, const char* name, int index = -1)
      : handle_(reinterpret_cast<AtenTensorHandle>(value)), name_(name), index_(index) {
    check(torch_abi.aoti_torch_get_numel(handle_, &numel_) == 0, "numel failed");
    if (numel_ == 0) return;
    check(torch_abi.aoti_torch_get_dim(handle_, &dimensions_) == 0 &&
              torch_abi.aoti_torch_get_sizes(handle_, &sizes_) == 0 &&
              torch_abi.aoti_torch_get_strides(handle_, &strides_) == 0,
          "a tensor has no shape");
  }
  ~Tensor() {
    if (handle_ != nullptr) torch_abi.aoti_torch_delete_tensor_object(handle_);
  }
  Tensor(Tensor&& other) noexcept
      : handle_(other.handle_), name_(other.name_), index_(other.index_), numel_(other.numel_),
        dimensions_(other.dimensions_), sizes_(other.sizes_), strides_(other.strides_) {
    other.handle_ = nullptr;
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  bool given() const { return numel_ > 0; }
  int64_t numel() const { return numel_; }
  int64_t dimensions() const { return dimensions_; }
  int64_t size(int64_t dimension) const { return sizes_[dimension]; }
  int64_t stride(int64_t dimension) const { return strides_[dimension]; }
  // Of logits [..., C].
  int64_t classes() const { return given() ? sizes_[dimensions_ - 1] : 0; }
  int64_t rows() const { return given() ? numel_ / classes() : 0; }

  DType dtype() const {
    int32_t dtype;
    check(torch_abi.aoti_torch_get_dtype(handle_, &dtype) == 0, "dtype failed");
    return DType(dtype);
  }
  // torch's current stream on the tensor's device.
  cuda::Stream stream() const {
    cuda::Stream current;
    check(torch_abi.aoti_torch_get_device_index(handle_, &current.device) == 0, "device_index failed");
    check(torch_abi.aoti_torch_get_current_cuda_stream(current.device, &current.handle) == 0, "no current stream");
    return current;
  }

  void require(bool condition, const char* what) const {
    if (condition) return;
    const std::string which = index_ < 0 ? "" : "[" + std::to_string(index_) + "]";
    throw std::runtime_error(std::string("fastkd_native: ") + name_ + which + " " + what);
  }

  void* data(DType expected) const {
    if (!given()) return nullptr;
    int64_t last, bytes;
    void* data;
    check(torch_abi.aoti_torch_get_storage_offset(handle_, &last) == 0 &&
              torch_abi.aoti_torch_get_storage_size(handle_, &bytes) == 0 &&
              torch_abi.aoti_torch_get_data_ptr(handle_, &data) == 0,
          "a tensor has no storage");
    for (int64_t i = 0; i < dimensions_; i++) last += (sizes_[i] - 1) * strides_[i];
    require(data != nullptr && (last + 1) * width_of(expected) <= bytes,
            "has elements, but its storage does not hold them (freed, resized, or a wrapper subclass)");
    return data;
  }
  const int64_t* integers() const {
    require(!given() || dtype() == DType::kLong, "must be int64");
    return static_cast<const int64_t*>(data(DType::kLong));
  }
  float* floats() const {
    require(!given() || dtype() == DType::kFloat, "must be float32");
    return static_cast<float*>(data(DType::kFloat));
  }
  // Checks that the tensor is contiguous and has `count` elements.
  float* dense_floats(int64_t count) const {
    require(numel_ == count, "has the wrong number of elements for its rows");
    int64_t dense = 1;
    for (int64_t i = dimensions_ - 1; i >= 0; dense *= sizes_[i], i--)
      require(sizes_[i] == 1 || strides_[i] == dense, "must be contiguous");
    return floats();
  }

  Matrix matrix() const {
    require(dimensions_ == 2 || dimensions_ == 3, "must have two or three dimensions");
    const DType type = dtype();
    require(type == DType::kHalf || type == DType::kFloat || type == DType::kBFloat16,
            "must be float32, bfloat16 or float16");
    require(classes() == 1 || strides_[dimensions_ - 1] == 1, "must have dense rows");
    if (dimensions_ == 2) return {data(type), strides_[0], INT64_MAX, 0, type};
    return {data(type), strides_[1], sizes_[1], strides_[0], type};
  }

 private:
  AtenTensorHandle handle_;
  const char* name_;
  int index_;
  int64_t numel_, dimensions_ = 0;
  int64_t *sizes_ = nullptr, *strides_ = nullptr;
};

double as_double(StableIValue value) {
  double result;
  static_assert(sizeof result == sizeof value, "a StableIValue holds a double");
  __builtin_memcpy(&result, &value, sizeof result);
  return result;
}

std::vector<Tensor> single_tensor(StableIValue value, const char* name) {
  std::vector<Tensor> tensors;
  tensors.emplace_back(value, name);
  return tensors;
}

// A Tensor[] argument: owns the list and its tensors.
std::vector<Tensor> tensor_list(StableIValue value, const char* name) {
  struct List {
    StableListHandle handle;
    ~List() { torch_abi.torch_delete_list(handle); }
  } list{reinterpret_cast<StableListHandle>(value)};
  size_t count;
  check(torch_abi.torch_list_size(list.handle, &count) == 0, "list_size failed");
  std::vector<Tensor> tensors;
  tensors.reserve(count);
  for (size_t i = 0; i < count; i++) {
    StableIValue item;
    check(torch_abi.torch_list_get_item(list.handle, i, &item) == 0, "list_get_item failed");
    tensors.emplace_back(item, name, int(i));
  }
  return tensors;
}

// The tensors of a row loss, in the order of the schema. All pairs have the same shape.
struct RowArguments {
  std::vector<Tensor> students, teachers;
  int64_t known = -1;  // classes at which the teacher is known; -1: at all
  Tensor target, row_weight, losses, terms, gradient, sums, term_sums, dynamic;
  float scale;

  RowArguments(const StableIValue* stack, std::vector<Tensor> (*logits)(StableIValue, const char*))
      : students(logits(stack[0], "student_logits")), teachers(logits(stack[1], "teacher_logits")),
        target(stack[2], "target"), row_weight(stack[3], "row_weight"), losses(stack[5], "rows"),
        terms(stack[6], "terms"), gradient(stack[7], "gradient"), sums(stack[8], "sums"),
        term_sums(stack[9], "term_sums"), dynamic(stack[10], "dynamic"), scale(float(as_double(stack[4]))) {
    check(!students.empty() && students.size() == teachers.size(), "student_logits and teacher_logits must pair up");
    dynamic.require(dynamic.numel() <= kOptions, "has more values than a loss has options");
  }

  int pairs() const { return int(students.size()); }
  int64_t count() const { return students[0].rows(); }

  // The rows of each pair, with checked pointers.
  std::vector<Rows> rows() const {
    const int64_t count = this->count(), all = count * pairs(), classes = students[0].classes();
    Rows first{};
    first.count = count;
    first.classes = classes;
    first.scale = scale;
    first.losses = losses.dense_floats(all);
    first.term_stride = all;
    if (terms.given()) first.terms = terms.dense_floats(kTerms * all);
    if (target.given()) {
      target.require(target.dimensions() == 1 && target.numel() == count, "must have one label per row");
      first.target = target.integers();
      first.target_stride = target.stride(0);
    }
    int64_t weight_step = 0;
    if (row_weight.given()) {
      const bool per_pair = row_weight.dimensions() == 2;
      row_weight.require((per_pair && row_weight.size(0) == pairs() && row_weight.size(1) == count) ||
                             (row_weight.dimensions() == 1 && row_weight.size(0) == count),
                         "must have one value per row, or per row of each pair");
      first.row_weight = row_weight.floats();
      first.row_weight_stride = row_weight.stride(per_pair ? 1 : 0);
      weight_step = per_pair ? row_weight.stride(0) : 0;
    }
    int64_t gradient_step = 0;  // bytes
    if (gradient.given()) {
      gradient.require(gradient.dimensions() == 2 && gradient.rows() == all && gradient.classes() == classes,
                       "must have one row per row of the logits");
      first.gradient = gradient.matrix();
      gradient_step = count * first.gradient.stride * width_of(first.gradient.dtype);
    }
    std::vector<Rows> rows(pairs(), first);
    for (int pair = 0; pair < pairs(); pair++) {
      Rows& pair_rows = rows[pair];
      students[pair].require(students[pair].rows() == count && students[pair].classes() == classes,
                             "must have the same shape as the first student_logits");
      teachers[pair].require(
          teachers[pair].rows() == count && teachers[pair].classes() == (known < 0 ? classes : known + 1),
          "must have the rows of the first student_logits, and its classes or one more than are known");
      pair_rows.student = students[pair].matrix();
      pair_rows.teacher = teachers[pair].matrix();
      pair_rows.losses += pair * count;
      if (pair_rows.terms != nullptr) pair_rows.terms += pair * count;
      if (pair_rows.row_weight != nullptr) pair_rows.row_weight += pair * weight_step;
      if (pair_rows.gradient.data != nullptr)
        pair_rows.gradient.data = static_cast<char*>(pair_rows.gradient.data) + pair * gradient_step;
    }
    return rows;
  }
};

}  // namespace
}  // namespace fastkd

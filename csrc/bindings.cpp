// The operators of namespace fastkd_native: arguments unpacked, rows shared out over torch's threads, or put into a
// CUDA stream.
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cuda/launch.h"
#include "torch_abi.h"

namespace fastkd {
namespace {

// ---- arguments -----------------------------------------------------------------------------------------------

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
  throw std::runtime_error("fastkd_native: a dtype without a width");
}

// A tensor argument: ours to release. Its memory is reached only through data(), which looks at the storage first:
// a tensor may have elements and no memory behind them. One without elements is an argument that is not given.
class Tensor {
 public:
  // `index` of several tensors under one name; -1 where there is one.
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
  // Of a tensor of rows.
  int64_t classes() const { return given() ? sizes_[dimensions_ - 1] : 0; }
  int64_t rows() const { return given() ? numel_ / classes() : 0; }

  DType dtype() const {
    int32_t dtype;
    check(torch_abi.aoti_torch_get_dtype(handle_, &dtype) == 0, "dtype failed");
    return DType(dtype);
  }
  // The stream that torch puts its own kernels into, on this tensor's device.
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
            "has elements, but its storage does not hold them (freed, resized, or a wrapper's)");
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
  // As many numbers as asked for, one after the other.
  float* dense_floats(int64_t count) const {
    require(numel_ == count, "has another number of elements than its rows ask for");
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

std::vector<Tensor> one_tensor(StableIValue value, const char* name) {
  std::vector<Tensor> tensors;
  tensors.emplace_back(value, name);
  return tensors;
}

// A Tensor[] argument: the list and its tensors are ours to release.
std::vector<Tensor> tensors_of(StableIValue value, const char* name) {
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

// The tensors that every row loss takes, in the order of its schema. The pairs of logits are alike.
struct RowArguments {
  std::vector<Tensor> students, teachers;
  Tensor target, row_weight, losses, terms, gradient, sums, dynamic;
  float scale;

  RowArguments(const StableIValue* stack, std::vector<Tensor> (*logits)(StableIValue, const char*))
      : students(logits(stack[0], "student_logits")), teachers(logits(stack[1], "teacher_logits")),
        target(stack[2], "target"), row_weight(stack[3], "row_weight"), losses(stack[5], "rows"),
        terms(stack[6], "terms"), gradient(stack[7], "gradient"), sums(stack[8], "sums"),
        dynamic(stack[9], "dynamic"), scale(float(as_double(stack[4]))) {
    check(!students.empty() && students.size() == teachers.size(), "student_logits and teacher_logits must pair up");
    dynamic.require(dynamic.numel() <= kOptions, "has more numbers than a loss has options");
  }

  int pairs() const { return int(students.size()); }
  int64_t count() const { return students[0].rows(); }

  // The rows of every pair, checked and found in memory.
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
      target.require(target.dimensions() == 1 && target.numel() == count, "must have one label for each row");
      first.target = target.integers();
      first.target_stride = target.stride(0);
    }
    int64_t weight_step = 0;
    if (row_weight.given()) {
      const bool of_pairs = row_weight.dimensions() == 2;
      row_weight.require((of_pairs && row_weight.size(0) == pairs() && row_weight.size(1) == count) ||
                             (row_weight.dimensions() == 1 && row_weight.size(0) == count),
                         "must have one number for each row, or for each row of each pair");
      first.row_weight = row_weight.floats();
      first.row_weight_stride = row_weight.stride(of_pairs ? 1 : 0);
      weight_step = of_pairs ? row_weight.stride(0) : 0;
    }
    int64_t gradient_step = 0;  // bytes
    if (gradient.given()) {
      gradient.require(gradient.dimensions() == 2 && gradient.rows() == all && gradient.classes() == classes,
                       "must have a row for each row of the logits");
      first.gradient = gradient.matrix();
      gradient_step = count * first.gradient.stride * width_of(first.gradient.dtype);
    }
    std::vector<Rows> rows(pairs(), first);
    for (int pair = 0; pair < pairs(); pair++) {
      Rows& of_pair = rows[pair];
      for (const Tensor* logits : {&students[pair], &teachers[pair]})
        logits->require(logits->rows() == count && logits->classes() == classes, "has another shape than its pair");
      of_pair.student = students[pair].matrix();
      of_pair.teacher = teachers[pair].matrix();
      of_pair.losses += pair * count;
      if (of_pair.terms != nullptr) of_pair.terms += pair * count;
      if (of_pair.row_weight != nullptr) of_pair.row_weight += pair * weight_step;
      if (of_pair.gradient.data != nullptr)
        of_pair.gradient.data = static_cast<char*>(of_pair.gradient.data) + pair * gradient_step;
    }
    return rows;
  }
};

// ---- threads -------------------------------------------------------------------------------------------------

constexpr int64_t kElementsWorthAThread = 16384;

void parallel_parts(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
  check(torch_abi.torch_parallel_for(0, count, 1, body, context) == 0, "parallel_for failed");
}

// More than one where there are fewer rows than threads, and enough classes for all of them.
int parts_a_row(const Rows& rows) {
  uint32_t threads;
  check(torch_abi.torch_get_num_threads(&threads) == 0, "get_num_threads failed");
  if (rows.count == 0 || rows.count >= int64_t(threads)) return 1;
  const int64_t wanted = (threads + rows.count - 1) / rows.count, worth = rows.classes / kElementsWorthAThread;
  return int(wanted < worth ? wanted : worth);
}

template <class Body>
void parallel_rows(int64_t count, int64_t classes, const Body& body) {
  const int64_t grain = classes > 0 ? (kElementsWorthAThread + classes - 1) / classes : 1;
  const auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  check(torch_abi.torch_parallel_for(0, count, grain, call, const_cast<Body*>(&body)) == 0, "parallel_for failed");
}

// ---- operators -----------------------------------------------------------------------------------------------

// The last four numbers are a plan of fastkd/ops/team_plan.py, of which the CPU knows nothing.
#define FASTKD_PLAN_SCHEMA "int threads_a_row=0, int rows_a_block=0, int blocks_a_row=0, int slots=0) -> ()"

#define FASTKD_ROW_LOSS_SCHEMA \
  "Tensor target, Tensor row_weight, float scale, Tensor(a!) rows, Tensor(b!) terms, Tensor(c!) gradient, " \
  "Tensor(d!) sums, Tensor dynamic, int loss, float o0, float o1, float o2, float o3, float o4, float o5, " \
  "float o6, float o7, " FASTKD_PLAN_SCHEMA

// A list costs a small loss more than its own arithmetic does, so one pair has an operator of its own.
constexpr const char* kRowLossSchema =
    "row_loss(Tensor student_logits, Tensor teacher_logits, " FASTKD_ROW_LOSS_SCHEMA;
constexpr const char* kRowLossOfPairsSchema =
    "row_loss_of_pairs(Tensor[] student_logits, Tensor[] teacher_logits, " FASTKD_ROW_LOSS_SCHEMA;
constexpr const char* kScaleRowsSchema = "scale_rows_(Tensor(a!) gradient, Tensor upstream, " FASTKD_PLAN_SCHEMA;

constexpr int kFirstOption = 11;

LossOptions loss_options(const StableIValue* stack) {
  LossOptions options;
  options.loss = Loss(int32_t(int64_t(stack[kFirstOption - 1])));
  for (int i = 0; i < kOptions; i++) options.values[i] = float(as_double(stack[kFirstOption + i]));
  return options;
}

cuda::TeamPlan team_plan(const StableIValue* stack) {
  return {int32_t(stack[0]), int32_t(stack[1]), int32_t(stack[2]), int32_t(stack[3])};
}

void row_loss_on_cpu(const RowArguments& arguments, LossOptions options) {
  const int64_t known = arguments.dynamic.numel();
  const float* values = arguments.dynamic.dense_floats(known);
  for (int64_t i = 0; i < known; i++) options.values[i] = values[i];
  check(kernels().computes(options), "there is no such loss");
  float* sums = arguments.sums.given() ? arguments.sums.dense_floats(arguments.pairs()) : nullptr;
  for (Rows& rows : arguments.rows()) {
    if (!reads_teacher(options)) rows.teacher = rows.student;
    const int parts = parts_a_row(rows);
    if (parts > 1) kernels().row_loss_in_parts(rows, options, parts, parallel_parts);
    else
      parallel_rows(rows.count, rows.classes,
                    [&](int64_t begin, int64_t end) { kernels().row_loss(rows, options, begin, end); });
    if (sums == nullptr) continue;
    double total = 0;
    for (int64_t row = 0; row < rows.count; row++) total += rows.losses[row];
    *sums++ = float(total);
  }
}

void row_loss_on_cuda(const RowArguments& arguments, const LossOptions& options, const cuda::TeamPlan& plan) {
  if (arguments.count() == 0) return;
  const int64_t values = arguments.dynamic.numel();
  const cuda::DynamicOptions dynamic{arguments.dynamic.dense_floats(values), int32_t(values)};
  const cuda::Stream stream = arguments.students[0].stream();
  const std::vector<Rows> rows = arguments.rows();
  for (int first = 0; first < arguments.pairs(); first += cuda::kMostPairs) {
    const int left = arguments.pairs() - first;
    cuda::launch_row_loss(&rows[first], left < cuda::kMostPairs ? left : cuda::kMostPairs, options, dynamic, plan,
                          stream);
  }
}

template <std::vector<Tensor> (*kLogits)(StableIValue, const char*)>
void row_loss(StableIValue* stack, uint64_t, uint64_t) {
  row_loss_on_cpu(RowArguments(stack, kLogits), loss_options(stack));
}

template <std::vector<Tensor> (*kLogits)(StableIValue, const char*)>
void row_loss_cuda(StableIValue* stack, uint64_t, uint64_t) {
  row_loss_on_cuda(RowArguments(stack, kLogits), loss_options(stack), team_plan(stack + kFirstOption + kOptions));
}

struct ScaleArguments {
  Tensor gradient, factors;

  explicit ScaleArguments(const StableIValue* stack) : gradient(stack[0], "gradient"), factors(stack[1], "upstream") {
    factors.require(!gradient.given() || (factors.dimensions() == 1 && factors.numel() == gradient.rows()),
                    "must have one number for each row of the gradient");
  }
};

void scale_rows(StableIValue* stack, uint64_t, uint64_t) {
  const ScaleArguments arguments(stack);
  if (!arguments.gradient.given()) return;
  const Matrix matrix = arguments.gradient.matrix();
  const float* factors = arguments.factors.floats();
  const int64_t count = arguments.gradient.rows(), classes = arguments.gradient.classes();
  const int64_t stride = arguments.factors.stride(0);
  // Mostly all factors are 1: then no thread is woken.
  const int64_t distinct = stride == 0 ? 1 : count;
  bool all_ones = true;
  for (int64_t row = 0; row < distinct; row++) all_ones = all_ones && factors[row * stride] == 1.0f;
  if (all_ones) return;
  parallel_rows(count, classes, [&](int64_t begin, int64_t end) {
    kernels().scale_rows(matrix, factors, stride, classes, begin, end);
  });
}

void scale_rows_cuda(StableIValue* stack, uint64_t, uint64_t) {
  const ScaleArguments arguments(stack);
  const Tensor &gradient = arguments.gradient, &factors = arguments.factors;
  if (!gradient.given()) return;
  cuda::launch_scale_rows(gradient.matrix(), factors.floats(), factors.stride(0), gradient.rows(), gradient.classes(),
                          team_plan(stack + 2), gradient.stream());
}

struct Operator {
  const char* schema;
  const char* name;
  void (*cpu)(StableIValue*, uint64_t, uint64_t);
  void (*cuda)(StableIValue*, uint64_t, uint64_t);
};

const Operator kOperators[] = {
    {kRowLossSchema, "row_loss", row_loss<one_tensor>, row_loss_cuda<one_tensor>},
    {kRowLossOfPairsSchema, "row_loss_of_pairs", row_loss<tensors_of>, row_loss_cuda<tensors_of>},
    {kScaleRowsSchema, "scale_rows_", scale_rows, scale_rows_cuda},
};

}  // namespace
}  // namespace fastkd

#define FASTKD_EXPORT extern "C" __attribute__((visibility("default")))

// Called once by fastkd/ops/native.py with the paths of the torch libraries that are loaded. Returns nullptr, or why
// the operators could not be registered.
FASTKD_EXPORT const char* fastkd_register(const char* torch_library_path, const char* torch_cuda_library_path) {
  using namespace fastkd;
  if (const char* error = load_torch_abi(torch_library_path, torch_cuda_library_path)) return error;
  const bool with_cuda = torch_abi.aoti_torch_get_current_cuda_stream != nullptr && cuda::absent() == nullptr;
  const auto implementations = [](const char* key, TorchLibraryHandle* library) {
    return torch_abi.aoti_torch_library_init_impl("fastkd_native", key, __FILE__, __LINE__, library);
  };
  TorchLibraryHandle definitions, on_cpu, on_cuda;
  bool failed = torch_abi.aoti_torch_library_init_fragment("fastkd_native", __FILE__, __LINE__, &definitions) != 0 ||
                implementations("CPU", &on_cpu) != 0 || (with_cuda && implementations("CUDA", &on_cuda) != 0);
  for (const Operator& op : kOperators)
    failed = failed || torch_abi.aoti_torch_library_def(definitions, op.schema) != 0 ||
             torch_abi.torch_library_impl(on_cpu, op.name, op.cpu, kTorchVersion) != 0 ||
             (with_cuda && torch_abi.torch_library_impl(on_cuda, op.name, op.cuda, kTorchVersion) != 0);
  return failed ? "torch refused the registration of the operators" : nullptr;
}

// Whether all labels are classes, and none of them the one to leave out.
FASTKD_EXPORT bool fastkd_labels_all_count(const int64_t* labels, int64_t count, int64_t classes, int64_t ignore_index) {
  bool all = true;
  for (int64_t i = 0; i < count; i++)
    all = all && labels[i] >= 0 && labels[i] < classes && labels[i] != ignore_index;
  return all;
}

// What is wrong with the environment's FASTKD_ISA; nullptr where nothing is. Until then no kernel may be asked for.
FASTKD_EXPORT const char* fastkd_instruction_set_refusal() { return fastkd::instruction_set_refusal(); }

FASTKD_EXPORT const char* fastkd_instruction_set() { return fastkd::kernels().name; }

// Why there are no CUDA kernels in this build, or none that run on this device; nullptr where there are.
FASTKD_EXPORT const char* fastkd_cuda_absent() { return fastkd::cuda::absent(); }
FASTKD_EXPORT const char* fastkd_cuda_missing(int32_t device) { return fastkd::cuda::missing(device); }

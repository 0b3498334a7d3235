// The operators of namespace fastkd_native: arguments unpacked, rows shared out over torch's threads, or put into a
// CUDA stream.
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "cuda/launch.h"
#include "torch_abi.h"

namespace fastkd {
namespace {

// ---- arguments -----------------------------------------------------------------------------------------------

void check(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(std::string("fastkd_native: ") + message);
}

// A tensor argument: ours to release.
class Tensor {
 public:
  explicit Tensor(StableIValue value) : handle_(reinterpret_cast<AtenTensorHandle>(value)) {}
  ~Tensor() { torch_abi.aoti_torch_delete_tensor_object(handle_); }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  int64_t numel() const {
    int64_t value;
    check(torch_abi.aoti_torch_get_numel(handle_, &value) == 0, "numel failed");
    return value;
  }
  int64_t size(int dimension) const {
    int64_t* sizes;
    check(torch_abi.aoti_torch_get_sizes(handle_, &sizes) == 0, "sizes failed");
    return sizes[dimension];
  }
  int64_t stride(int dimension) const {
    int64_t* strides;
    check(torch_abi.aoti_torch_get_strides(handle_, &strides) == 0, "strides failed");
    return strides[dimension];
  }
  // The stream that torch puts its own kernels into, on this tensor's device.
  cuda::Stream stream() const {
    cuda::Stream current;
    check(torch_abi.aoti_torch_get_device_index(handle_, &current.device) == 0, "device_index failed");
    check(torch_abi.aoti_torch_get_current_cuda_stream(current.device, &current.handle) == 0, "no current stream");
    return current;
  }
  template <class T>
  T* data_or_null() const {
    if (numel() == 0) return nullptr;
    void* data;
    check(torch_abi.aoti_torch_get_data_ptr(handle_, &data) == 0, "data_ptr failed");
    return static_cast<T*>(data);
  }
  Matrix matrix() const {
    int32_t dtype;
    check(torch_abi.aoti_torch_get_dtype(handle_, &dtype) == 0, "dtype failed");
    check(dtype == int32_t(DType::kHalf) || dtype == int32_t(DType::kFloat) || dtype == int32_t(DType::kBFloat16),
          "logits must be float32, bfloat16 or float16");
    check(size(1) <= 1 || stride(1) == 1, "rows must be dense");
    return {data_or_null<void>(), stride(0), DType(dtype)};
  }

 private:
  AtenTensorHandle handle_;
};

double as_double(StableIValue value) {
  double result;
  static_assert(sizeof result == sizeof value, "a StableIValue holds a double");
  __builtin_memcpy(&result, &value, sizeof result);
  return result;
}

// The tensors that every row loss takes, in the order of its schema. Of several pairs of logits, all alike, the first
// pair is given as tensors and all of them by their addresses.
struct RowArguments {
  Tensor student, teacher, target, row_weight, losses, terms, gradient, sums, addresses;
  float scale;

  explicit RowArguments(const StableIValue* stack)
      : student(stack[0]), teacher(stack[1]), target(stack[2]), row_weight(stack[3]), losses(stack[5]),
        terms(stack[6]), gradient(stack[7]), sums(stack[8]), addresses(stack[9]), scale(float(as_double(stack[4]))) {}

  int pairs() const { return addresses.numel() == 0 ? 1 : int(addresses.size(0)); }

  Rows rows(int pair) const {
    Rows rows{student.matrix(), teacher.matrix(), gradient.matrix(), student.size(0), student.size(1),
              target.data_or_null<int64_t>(), target.numel() > 0 ? target.stride(0) : 0,
              row_weight.data_or_null<float>(), scale, losses.data_or_null<float>(), terms.data_or_null<float>()};
    if (pairs() == 1) return rows;
    const int64_t* of_pair = addresses.data_or_null<int64_t>() + 2 * pair;
    rows.student.data = reinterpret_cast<void*>(of_pair[0]);
    rows.teacher.data = reinterpret_cast<void*>(of_pair[1]);
    rows.losses += pair * rows.count;
    if (rows.terms != nullptr) rows.terms += pair * terms.size(1) * rows.count;
    if (rows.gradient.data != nullptr) {
      const int64_t width = rows.gradient.dtype == DType::kFloat ? 4 : 2;
      rows.gradient.data = static_cast<char*>(rows.gradient.data) + pair * rows.count * rows.gradient.stride * width;
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

constexpr const char* kRowLossSchema =
    "row_loss(Tensor student_logits, Tensor teacher_logits, Tensor target, Tensor row_weight, float scale, "
    "Tensor(a!) rows, Tensor(b!) terms, Tensor(c!) gradient, Tensor(d!) sums, Tensor addresses, int loss, "
    "float o0, float o1, float o2, float o3, float o4, float o5, float o6, float o7, " FASTKD_PLAN_SCHEMA;
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

void row_loss(StableIValue* stack, uint64_t, uint64_t) {
  const RowArguments arguments(stack);
  const LossOptions options = loss_options(stack);
  float* sums = arguments.sums.data_or_null<float>();
  for (int pair = 0; pair < arguments.pairs(); pair++) {
    const Rows rows = arguments.rows(pair);
    const int parts = parts_a_row(rows);
    if (parts > 1) kernels().row_loss_in_parts(rows, options, parts, parallel_parts);
    else
      parallel_rows(rows.count, rows.classes,
                    [&](int64_t begin, int64_t end) { kernels().row_loss(rows, options, begin, end); });
    if (sums == nullptr) continue;
    double total = 0;
    for (int64_t row = 0; row < rows.count; row++) total += rows.losses[row];
    sums[pair] = float(total);
  }
}

void row_loss_cuda(StableIValue* stack, uint64_t, uint64_t) {
  const RowArguments arguments(stack);
  if (arguments.student.size(0) == 0) return;
  const LossOptions options = loss_options(stack);
  const cuda::TeamPlan plan = team_plan(stack + kFirstOption + kOptions);
  for (int first = 0; first < arguments.pairs(); first += cuda::kMostPairs) {
    Rows pairs[cuda::kMostPairs];
    int count = 0;
    while (count < cuda::kMostPairs && first + count < arguments.pairs()) {
      pairs[count] = arguments.rows(first + count);
      count++;
    }
    cuda::launch_row_loss(pairs, count, options, plan, arguments.student.stream());
  }
}

void scale_rows(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor gradient(stack[0]), upstream(stack[1]);
  const Matrix matrix = gradient.matrix();
  const float* factors = upstream.data_or_null<float>();
  const int64_t count = gradient.size(0), classes = gradient.size(1), stride = upstream.stride(0);
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
  const Tensor gradient(stack[0]), upstream(stack[1]);
  if (gradient.numel() == 0) return;
  cuda::launch_scale_rows(gradient.matrix(), upstream.data_or_null<float>(), upstream.stride(0), gradient.size(0),
                          gradient.size(1), team_plan(stack + 2), gradient.stream());
}

struct Operator {
  const char* schema;
  const char* name;
  void (*cpu)(StableIValue*, uint64_t, uint64_t);
  void (*cuda)(StableIValue*, uint64_t, uint64_t);
};

const Operator kOperators[] = {
    {kRowLossSchema, "row_loss", row_loss, row_loss_cuda},
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

FASTKD_EXPORT const char* fastkd_instruction_set() { return fastkd::kernels().name; }

// Why there are no CUDA kernels in this build, or none that run on this device; nullptr where there are.
FASTKD_EXPORT const char* fastkd_cuda_absent() { return fastkd::cuda::absent(); }
FASTKD_EXPORT const char* fastkd_cuda_missing(int32_t device) { return fastkd::cuda::missing(device); }

// The operators of namespace fastkd_native: rows distributed over torch's threads, or launched on a CUDA stream.
#include "operator_arguments.h"

namespace fastkd {
namespace {

// ---- threads -------------------------------------------------------------------------------------------------

constexpr int64_t kMinElementsPerThread = 16384;  // fewer do not pay for a thread

void parallel_parts(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
  check(torch_abi.torch_parallel_for(0, count, 1, body, context) == 0, "parallel_for failed");
}

// More than one if there are fewer rows than threads, and enough classes to split.
int parts_per_row(const Rows& rows) {
  uint32_t threads;
  check(torch_abi.torch_get_num_threads(&threads) == 0, "get_num_threads failed");
  if (rows.count == 0 || rows.count >= int64_t(threads)) return 1;
  const int64_t wanted = (threads + rows.count - 1) / rows.count, largest = rows.classes / kMinElementsPerThread;
  return int(wanted < largest ? wanted : largest);
}

template <class Body>
void parallel_rows(int64_t count, int64_t classes, const Body& body) {
  const int64_t grain = classes > 0 ? (kMinElementsPerThread + classes - 1) / classes : 1;
  const auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); };
  check(torch_abi.torch_parallel_for(0, count, grain, call, const_cast<Body*>(&body)) == 0, "parallel_for failed");
}

// ---- operators -----------------------------------------------------------------------------------------------

// The TeamPlan of fastkd/ops/team_plan.py; ignored on the CPU.
#define FASTKD_PLAN_SCHEMA "int threads_per_row=0, int rows_per_block=0, int blocks_per_row=0, int slots=0) -> ()"

#define FASTKD_CALL_SCHEMA \
  "Tensor target, Tensor row_weight, float scale, Tensor(a!) rows, Tensor(b!) terms, Tensor(c!) gradient, " \
  "Tensor(d!) sums, Tensor(e!) term_sums, Tensor dynamic, int loss, int needs, float o0, float o1, float o2, " \
  "float o3, float o4, float o5, float o6, float o7, "

// Unpacking a Tensor[] takes longer than the arithmetic of a small loss, so a single pair has its own operator.
constexpr const char* kRowLossSchema =
    "row_loss(Tensor student_logits, Tensor teacher_logits, " FASTKD_CALL_SCHEMA FASTKD_PLAN_SCHEMA;
constexpr const char* kRowLossOfPairsSchema =
    "row_loss_of_pairs(Tensor[] student_logits, Tensor[] teacher_logits, " FASTKD_CALL_SCHEMA FASTKD_PLAN_SCHEMA;
constexpr const char* kTopKLossSchema =
    "top_k_loss(Tensor student_logits, Tensor teacher_logits, " FASTKD_CALL_SCHEMA
    "Tensor indices, int needs_at_k, Tensor(f!) workspace, int threads_at_k=0, int rows_per_block_at_k=0, "
    "int blocks_at_k=0, int slots_at_k=0, " FASTKD_PLAN_SCHEMA;
constexpr const char* kScaleRowsSchema = "scale_rows_(Tensor(a!) gradient, Tensor grad_output, " FASTKD_PLAN_SCHEMA;

constexpr int kFirstOption = 13;

LossOptions loss_options(const StableIValue* stack) {
  LossOptions options;
  options.loss = int32_t(int64_t(stack[kFirstOption - 2]));
  options.needs = uint32_t(int64_t(stack[kFirstOption - 1]));
  for (int i = 0; i < kOptions; i++) options.values[i] = float(as_double(stack[kFirstOption + i]));
  return options;
}

cuda::TeamPlan team_plan(const StableIValue* stack) {
  return {int32_t(stack[0]), int32_t(stack[1]), int32_t(stack[2]), int32_t(stack[3])};
}

float sum_of(const float* values, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; i++) total += values[i];
  return float(total);
}

// Computes the rows of each pair by compute(rows, options), and the sums of losses and terms that are asked for.
template <class Compute>
void loss_on_cpu(const RowArguments& arguments, LossOptions options, const Compute& compute) {
  const int64_t dynamic = arguments.dynamic.numel();
  const float* values = arguments.dynamic.dense_floats(dynamic);
  for (int64_t i = 0; i < dynamic; i++) options.values[i] = values[i];
  const int pairs = arguments.pairs();
  float* sums = arguments.sums.given() ? arguments.sums.dense_floats(pairs) : nullptr;
  float* term_sums = arguments.term_sums.given() ? arguments.term_sums.dense_floats(kTerms * pairs) : nullptr;
  for (Rows& rows : arguments.rows()) {
    compute(rows, options);
    if (sums != nullptr) *sums++ = sum_of(rows.losses, rows.count);
    if (term_sums == nullptr || rows.terms == nullptr) continue;
    for (int term = 0; term < kTerms; term++)
      term_sums[term * pairs] = sum_of(rows.terms + term * rows.term_stride, rows.count);
    term_sums++;
  }
}

void check_computes(const LossOptions& options) {
  check(kernels().computes(options), "unknown loss, or no kernel compiled for its needs");
}

void row_loss_on_cpu(const RowArguments& arguments, const LossOptions& given) {
  check_computes(given);
  loss_on_cpu(arguments, given, [](Rows& rows, const LossOptions& options) {
    if (!(options.needs & kDistills)) rows.teacher = rows.student;
    const int parts = parts_per_row(rows);
    if (parts > 1) kernels().row_loss_in_parts(rows, options, parts, parallel_parts);
    else
      parallel_rows(rows.count, rows.classes,
                    [&](int64_t begin, int64_t end) { kernels().row_loss(rows, options, begin, end); });
  });
}

void top_k_loss_on_cpu(const RowArguments& arguments, const LossOptions& given, const Known& known) {
  check_computes(options_at_k(given, known.needs));
  loss_on_cpu(arguments, given, [&](const Rows& rows, const LossOptions& options) {
    check(rows.teacher.dtype == DType::kFloat, "the logits of a teacher known at K classes must be float32");
    parallel_rows(rows.count, rows.classes, [&](int64_t begin, int64_t end) {
      kernels().top_k_loss(rows, known, options, begin, end);
    });
  });
}

cuda::DynamicOptions dynamic_options(const RowArguments& arguments) {
  const int64_t values = arguments.dynamic.numel();
  return {arguments.dynamic.dense_floats(values), int32_t(values)};
}

void row_loss_on_cuda(const RowArguments& arguments, const LossOptions& options, const cuda::TeamPlan& plan) {
  if (arguments.count() == 0) return;
  const cuda::DynamicOptions dynamic = dynamic_options(arguments);
  const cuda::Stream stream = arguments.students[0].stream();
  const std::vector<Rows> rows = arguments.rows();
  for (int first = 0; first < arguments.pairs(); first += cuda::kMaxPairs) {
    const int left = arguments.pairs() - first;
    cuda::launch_row_loss(&rows[first], left < cuda::kMaxPairs ? left : cuda::kMaxPairs, options, dynamic, plan,
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

// A row loss, and the arguments of top_k_loss after its options.
struct TopKArguments : RowArguments {
  Tensor indices, workspace;
  uint32_t needs;

  explicit TopKArguments(const StableIValue* stack)
      : RowArguments(stack, single_tensor), indices(stack[kFirstOption + kOptions], "indices"),
        workspace(stack[kFirstOption + kOptions + 2], "workspace"),
        needs(uint32_t(int64_t(stack[kFirstOption + kOptions + 1]))) {
    known = indices.classes();
  }

  Known known_classes() const {
    indices.require(indices.dimensions() == 2 && indices.size(0) == count() &&
                        (indices.stride(1) == 1 || indices.size(1) == 1),
                    "must be [N, K], with dense rows");
    return {indices.integers(), indices.stride(0), indices.size(1), needs};
  }
};

void top_k_loss(StableIValue* stack, uint64_t, uint64_t) {
  const TopKArguments arguments(stack);
  if (arguments.count() > 0) top_k_loss_on_cpu(arguments, loss_options(stack), arguments.known_classes());
}

void top_k_loss_cuda(StableIValue* stack, uint64_t, uint64_t) {
  const TopKArguments arguments(stack);
  if (arguments.count() == 0) return;
  const Known known = arguments.known_classes();
  const Tensor& workspace = arguments.workspace;
  workspace.require(workspace.dimensions() == 1 && workspace.stride(0) == 1 &&
                        workspace.numel() == cuda::workspace_words(arguments.count(), known.count),
                    "must be contiguous, and have the size for the rows and known classes");
  // A workspace that is not int64 is refused by integers(), which returns it for reading.
  cuda::launch_top_k_loss(arguments.rows()[0], known, loss_options(stack), dynamic_options(arguments),
                          const_cast<int64_t*>(workspace.integers()), team_plan(stack + kFirstOption + kOptions + 7),
                          team_plan(stack + kFirstOption + kOptions + 3), arguments.students[0].stream());
}

struct ScaleArguments {
  Tensor gradient, factors;

  explicit ScaleArguments(const StableIValue* stack)
      : gradient(stack[0], "gradient"), factors(stack[1], "grad_output") {
    factors.require(!gradient.given() || (factors.dimensions() == 1 && factors.numel() == gradient.rows()),
                    "must have one value per row of the gradient");
  }
};

void scale_rows(StableIValue* stack, uint64_t, uint64_t) {
  const ScaleArguments arguments(stack);
  if (!arguments.gradient.given()) return;
  const Matrix matrix = arguments.gradient.matrix();
  const float* factors = arguments.factors.floats();
  const int64_t count = arguments.gradient.rows(), classes = arguments.gradient.classes();
  const int64_t stride = arguments.factors.stride(0);
  // The usual case, all factors 1, starts no threads.
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
    {kRowLossSchema, "row_loss", row_loss<single_tensor>, row_loss_cuda<single_tensor>},
    {kRowLossOfPairsSchema, "row_loss_of_pairs", row_loss<tensor_list>, row_loss_cuda<tensor_list>},
    {kTopKLossSchema, "top_k_loss", top_k_loss, top_k_loss_cuda},
    {kScaleRowsSchema, "scale_rows_", scale_rows, scale_rows_cuda},
};

}  // namespace
}  // namespace fastkd

#define FASTKD_EXPORT extern "C" __attribute__((visibility("default")))

// Registers the operators. Called once by fastkd/ops/native.py with the paths of the loaded torch libraries. Returns
// nullptr, or the error.
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
  return failed ? "torch rejected the registration of the operators" : nullptr;
}

// The needs, losses and options, one line each, in the format that fastkd/ops/native.py expects.
template <class... Loss>
static std::string description(fastkd::LossList<Loss...>) {
#define FASTKD_NEED_NAME(name) " " #name
  std::string text = "needs" FASTKD_NEEDS(FASTKD_NEED_NAME);
#undef FASTKD_NEED_NAME
  ((text += std::string("\n") + Loss::kName + ": " + Loss::kOptionNames), ...);
  return text;
}
FASTKD_EXPORT const char* fastkd_losses() {
  static const std::string text = description(fastkd::Losses());
  return text.c_str();
}

// Whether all labels are in range, and none is ignore_index.
FASTKD_EXPORT bool fastkd_labels_all_valid(const int64_t* labels, int64_t count, int64_t classes,
                                           int64_t ignore_index) {
  bool all = true;
  for (int64_t i = 0; i < count; i++) all = all && labels[i] >= 0 && labels[i] < classes && labels[i] != ignore_index;
  return all;
}

// Whether all rows are such as top_k_loss expects; see cpu/top_k_rows.h. Tensors are contiguous.
FASTKD_EXPORT bool fastkd_top_k_ready(const int64_t* indices, const float* log_probs, const int64_t* labels,
                                      int64_t rows, int64_t count, int64_t classes, float most) {
  return fastkd::kernels().top_k_ready(indices, log_probs, labels, rows, count, classes, most);
}

// What is wrong with the environment variable FASTKD_ISA, or nullptr. Unless it is nullptr, kernels() throws.
FASTKD_EXPORT const char* fastkd_instruction_set_refusal() { return fastkd::instruction_set_refusal(); }

FASTKD_EXPORT const char* fastkd_instruction_set() { return fastkd::kernels().name; }

// Why this build has no CUDA kernels, or none for this device; nullptr if it has.
FASTKD_EXPORT const char* fastkd_cuda_absent() { return fastkd::cuda::absent(); }
FASTKD_EXPORT const char* fastkd_cuda_missing(int32_t device) { return fastkd::cuda::missing(device); }

// Kernel selection, argument checks and launch dimensions, shared by launch.cu and tests/cuda_emulation/.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <type_traits>

#include "mixture_rows.h"
#include "pointwise_rows.h"
#include "top_k_rows.h"

namespace fastkd {
namespace cuda {

typedef void (*RowKernel)(RowLossArguments);

// Whether calls of a loss may read the student alone: for a cross-entropy without a teacher.
template <class Loss, unsigned kNeeds>
constexpr bool kWithoutTeacher = std::is_same<Loss, Softmax>::value && !(kNeeds & kOwnSlopes);

// nullptr if the skeleton is not compiled for these needs.
template <class Loss, class Type, unsigned kNeeds>
RowKernel softmax_variant(bool distills) {
  if constexpr (kWithoutTeacher<Loss, kNeeds>)
    if (!distills) return softmax_rows<Loss, kNeeds, Type>;
  return distills ? softmax_rows<Loss, kNeeds | kDistills, Type> : nullptr;
}
template <class Loss, class Type, unsigned... kNeeds>
RowKernel softmax_kernel_for(unsigned needs, VariantList<kNeeds...>) {
  RowKernel found = nullptr;
  const bool distills = needs & kDistills;
  (void)(((needs & kCompiledNeeds) == kNeeds && (found = softmax_variant<Loss, Type, kNeeds>(distills), true)) || ...);
  return found;
}

template <class Loss, class Type>
RowKernel kernel_for(unsigned needs, SoftmaxFamily) {
  return softmax_kernel_for<Loss, Type>(needs, typename Loss::Variants());
}
template <class Loss, class Type>
RowKernel kernel_for(unsigned, MixtureFamily) {
  return mixture_rows<Loss, Type>;
}
template <class Loss, class Type>
RowKernel kernel_for(unsigned, PointwiseFamily) {
  return pointwise_rows<Loss, Type>;
}

template <class Type>
struct TypeOf {
  typedef Type type;
};

// visit(TypeOf<Type>()) with the type for matrices of these dtypes.
template <class Visit>
auto with_type(std::initializer_list<DType> dtypes, const Visit& visit) {
  const DType first = *dtypes.begin();
  for (DType dtype : dtypes)
    if (dtype != first) return visit(TypeOf<Varying>());
  switch (first) {
    case DType::kBFloat16: return visit(TypeOf<Fixed<DType::kBFloat16>>());
    case DType::kHalf: return visit(TypeOf<Fixed<DType::kHalf>>());
    case DType::kFloat: return visit(TypeOf<Fixed<DType::kFloat>>());
    default: throw std::runtime_error("fastkd_native: logits and gradients must be float32, bfloat16 or float16");
  }
}

// The kernel for pairs like this one; nullptr if the loss is unknown, or no kernel is compiled for its needs.
inline RowKernel row_kernel_for(const LossOptions& options, const Rows& pair) {
  return with_loss<RowKernel>(
      options.loss,
      [&](auto loss) {
        const DType student = pair.student.dtype;
        const DType teacher = options.needs & kDistills ? pair.teacher.dtype : student;
        return with_type({student, teacher, pair.gradient.data ? pair.gradient.dtype : student}, [&](auto type) {
          typedef decltype(loss) Loss;
          return kernel_for<Loss, typename decltype(type)::type>(options.needs, typename Loss::Family());
        });
      },
      Losses());
}

typedef void (*ScaleKernel)(ScaleArguments);
inline ScaleKernel scale_kernel_for(DType gradient) {
  return with_type({gradient}, [](auto type) -> ScaleKernel { return scale_rows<typename decltype(type)::type>; });
}

// Why a launch is invalid; nullptr if it is valid.
inline const char* refusal(int64_t classes, const TeamPlan& plan) {
  const auto is_power_of_two = [](int n) { return n > 0 && (n & (n - 1)) == 0; };
  const int threads = plan.threads_per_row * plan.rows_per_block;
  if (!is_power_of_two(plan.threads_per_row) || plan.rows_per_block < 1 || threads > kMaxThreads ||
      threads % kWarp != 0)
    return "threads_per_row must be a power of two, and a block must have whole warps, at most 512 threads";
  if (plan.rows_per_block > 1 && (plan.threads_per_row > kWarp || plan.blocks_per_row > 1))
    return "a block with several rows must have at most a warp per row, and no cluster";
  if (plan.blocks_per_row < 1 || plan.blocks_per_row > kMaxBlocks ||
      (plan.blocks_per_row > 1 && plan.threads_per_row < kWarp))
    return "blocks_per_row must be 1 to 16, with at least a warp per row in each block if there are several";
  if (classes > INT32_MAX - (1 << 20)) return "a row may have at most 2^31 - 2^20 classes";
  const int64_t vectors = (classes + kVector - 2) / kVector + 1, team = plan.threads_per_row * plan.blocks_per_row;
  if (plan.slots < kStages && (vectors + team - 1) / team > plan.slots)
    return "slots must hold all vectors of a thread, or at least 4";
  return nullptr;
}

inline bool is_kernel_dtype(DType dtype) {
  return dtype == DType::kFloat || dtype == DType::kBFloat16 || dtype == DType::kHalf;
}

inline const char* refusal(const Rows* pairs, int count, const TeamPlan& plan) {
  if (count < 1 || count > kMaxPairs) return "a launch takes 1 to 8 pairs of logits";
  for (const Matrix& matrix : {pairs[0].student, pairs[0].teacher, pairs[0].gradient})
    if (!is_kernel_dtype(matrix.dtype)) return "logits and gradients must be float32, bfloat16 or float16";
  for (int i = 1; i < count; i++) {
    if (pairs[i].count != pairs[0].count || pairs[i].classes != pairs[0].classes)
      return "the pairs of a launch must have equal rows and classes";
    if (pairs[i].student.dtype != pairs[0].student.dtype || pairs[i].teacher.dtype != pairs[0].teacher.dtype ||
        pairs[i].gradient.dtype != pairs[0].gradient.dtype)
      return "the pairs of a launch must have the same dtypes";
  }
  return refusal(pairs[0].classes, plan);
}

inline RowLossArguments arguments_of(const Rows* pairs, int count, const LossOptions& options,
                                     const DynamicOptions& dynamic, const TeamPlan& plan) {
  RowLossArguments arguments{};
  for (int i = 0; i < count; i++) arguments.pairs[i] = pairs[i];
  arguments.options = options;
  arguments.dynamic = dynamic;
  arguments.plan = plan;
  return arguments;
}

struct Grid {
  int64_t blocks_x;
  int blocks_y, threads, cluster;
  int64_t shared_bytes;
};

// For a kernel that reads logits of these dtypes.
inline Grid grid_of(int64_t rows, int pairs, const TeamPlan& plan, std::initializer_list<DType> dtypes) {
  const int64_t teams = (rows + plan.rows_per_block - 1) / plan.rows_per_block;
  int chunks_per_vector = 0;
  for (DType dtype : dtypes) chunks_per_vector += dtype == DType::kFloat ? 2 : 1;
  return {teams * plan.blocks_per_row, pairs, plan.threads_per_row * plan.rows_per_block, plan.blocks_per_row,
          shared_chunks(plan, chunks_per_vector) * int64_t(sizeof(Chunk))};
}

inline Grid row_loss_grid(const Rows* pairs, int count, const TeamPlan& plan) {
  return grid_of(pairs[0].count, count, plan, {pairs[0].student.dtype, pairs[0].teacher.dtype});
}

// No cluster: the blocks of a row do not communicate.
inline Grid scale_grid(int64_t rows, const TeamPlan& plan, DType gradient) {
  Grid grid = grid_of(rows, 1, plan, {gradient});
  grid.cluster = 1;
  return grid;
}

// ---- a teacher known at K classes ------------------------------------------------------------------------------

inline TopKWorkspace workspace_of(int64_t* words, int64_t rows, int64_t known) {
  float* logits = reinterpret_cast<float*>(words + rows * kStatisticsWords);
  return {logits, logits + rows * (known + 1), reinterpret_cast<TopKStatistics*>(words)};
}

// The rows of K + 1 classes.
inline Rows rows_at_k(const TopKArguments& arguments) {
  const TopKWorkspace& workspace = arguments.workspace;
  Rows rows = arguments.rows;
  rows.classes = arguments.known.count + 1;
  rows.student = {workspace.student, rows.classes, INT64_MAX, 0, DType::kFloat};
  rows.gradient = rows.student;
  rows.gradient.data = arguments.rows.gradient.data == nullptr ? nullptr : workspace.gradient;
  rows.target = arguments.known.needs & kLabelled ? &workspace.statistics->position : nullptr;
  rows.target_stride = kStatisticsWords;
  return rows;
}

inline const char* refusal(const TopKArguments& arguments) {
  const Rows& rows = arguments.rows;
  if (!is_kernel_dtype(rows.student.dtype) || !is_kernel_dtype(rows.gradient.dtype))
    return "logits and gradients must be float32, bfloat16 or float16";
  if (rows.teacher.dtype != DType::kFloat) return "the logits of a teacher known at K classes must be float32";
  if (arguments.known.count < 1 || arguments.known.count > rows.classes) return "1 to all classes can be known";
  return refusal(rows.classes, arguments.plan);
}

// Calls launch(kernel, its arguments, grid) for each kernel in order, unless the result says why they are invalid.
template <class Launch>
const char* each_top_k_launch(const TopKArguments& arguments, const TeamPlan& plan_at_k, const Launch& launch) {
  const LossOptions at_k = options_at_k(arguments.options, arguments.known.needs);
  const Rows rows = rows_at_k(arguments);
  const RowKernel kernel = row_kernel_for(at_k, rows);
  if (kernel == nullptr) return "unknown loss, or no kernel compiled for its needs";
  if (const char* reason = refusal(arguments)) return reason;
  if (const char* reason = refusal(&rows, 1, plan_at_k)) return reason;
  const Grid grid = grid_of(rows.count, 1, arguments.plan, {arguments.rows.student.dtype});
  void (*gather)(TopKArguments);
  void (*scatter)(TopKArguments);
  const DType student = arguments.rows.student.dtype;
  with_type({student, arguments.rows.gradient.data ? arguments.rows.gradient.dtype : student}, [&](auto type) {
    typedef typename decltype(type)::type Type;
    gather = gather_rows<Type>, scatter = scatter_rows<Type>;
  });
  launch(gather, arguments, grid);
  // Dynamic options include the weight of the cross-entropy, which is not read without its need.
  launch(kernel, arguments_of(&rows, 1, at_k, arguments.dynamic, plan_at_k), row_loss_grid(&rows, 1, plan_at_k));
  if (rows.gradient.data != nullptr || (arguments.options.needs & kCrossEntropy)) launch(scatter, arguments, grid);
  return nullptr;
}

}  // namespace cuda
}  // namespace fastkd

// The row skeleton of the pointwise family: sums over classes of a function of two logits. One pass, no statistics. And
// the scaling of a gradient by grad_output.
#pragma once

#include "prologue_epilogue.h"
#include "scalar_math.h"

namespace fastkd {
namespace cuda {

template <class Loss, class Type>
FASTKD_KERNEL(kRegisters<Type>)
pointwise_rows(FASTKD_PARAMETER RowLossArguments arguments) {
  const Rows& rows = arguments.pairs[block_y()];
  Team team(arguments.plan);
  const int64_t index = team.row();
  const RowInfo info = row_info(rows, index, false);
  const int classes = int(rows.classes);
  const Share<Type> share = share_of<Type>(team, arguments, rows, index, info.kind);
  const float temperature = options_of(arguments).values[0], inverse = 1.0f / temperature;
  const float slope_weight = info.weight * temperature;  // d loss / d z = T^2 f'(u) / T
  const bool with_gradient = rows.gradient.data != nullptr;
  const RowPointer<Type> gradient = gradient_row(rows, index, share);
  float total[] = {0.0f};
  share.first_pass([&](int column, const Vector<Type>& s, const Vector<Type>& t) {
    float slopes[kVector], sum = 0, product = 1;
#pragma unroll
    for (int i = 0; i < kVector; i++) {
      const ClassTerm<float> term = Loss::template formula<ScalarMath>(s.z[i], t.z[i], inverse);
      sum += term.value;
      if (Loss::kHasFactor) product *= term.factor;
      slopes[i] = term.slope * slope_weight;
    }
    if (Loss::kHasFactor) sum += logf(product);
    total[0] += sum;
    if (with_gradient) store_vector(gradient, column, classes, slopes);
  });
  team.all_reduce(total, Sum());
  team.arrive_before_exit();
  if (info.kind != RowKind::kComputed) write_uncomputed<Type>(team, rows, index, info.kind);
  else write_losses(team, rows, index, info.weight * temperature * temperature * total[0], {});
  team.wait_before_exit();
}

// gradient[row] *= grad_output[row], in place; a row whose factor is 1 is not accessed. The factor is read on the
// device, so that the host need not synchronise. No cross-block communication.
template <class Type>
FASTKD_KERNEL(kRegisters<Type>)
scale_rows(FASTKD_PARAMETER ScaleArguments arguments) {
  const Team team(arguments.plan);
  const int64_t index = team.row();
  if (index >= arguments.count) return;
  const float factor = arguments.grad_output[index * arguments.grad_output_stride];
  if (factor == 1.0f) return;
  const int classes = int(arguments.classes);
  const Share<Type, false> share(team, arguments.plan, arguments.gradient, arguments.gradient, index, classes);
  share.template first_pass<false>([&](int column, Vector<Type, false>& gradient, const Vector<Type, false>&) {
    for (float& value : gradient.z) value *= factor;
    store_vector(share.student(), column, classes, gradient.z);
  });
}

}  // namespace cuda
}  // namespace fastkd

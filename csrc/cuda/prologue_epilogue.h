// Prologue and epilogue of a row kernel: whether the row is computed, and a thread's share of its logits; the writing
// of losses, terms and constant gradients.
#pragma once

#include "share.h"

namespace fastkd {
namespace cuda {

enum class RowKind { kComputed, kIgnored, kInvalidLabel, kPastEnd };

struct RowInfo {
  RowKind kind;
  float weight;
  int label;  // -1 for none
};

template <class Arguments>
FASTKD_DEVICE LossOptions options_of(const Arguments& arguments) {
  LossOptions options = arguments.options;
#pragma unroll
  for (int i = 0; i < kOptions; i++)
    if (i < arguments.dynamic.count) options.values[i] = arguments.dynamic.values[i];
  return options;
}

// Rows of weight 0, and rows whose label is out of range, are not read.
FASTKD_DEVICE RowInfo row_info(const Rows& rows, int64_t index, bool labelled) {
  if (index >= rows.count) return {RowKind::kPastEnd, 0.0f, -1};
  const int64_t label = labelled ? rows.target[index * rows.target_stride] : -1;
  const float weight = weight_of(rows, index);
  if (weight == 0) return {RowKind::kIgnored, 0.0f, -1};
  if (labelled && (label < 0 || label >= rows.classes)) return {RowKind::kInvalidLabel, weight, -1};
  return {RowKind::kComputed, weight, int(label)};
}

// A thread's share of the row; empty unless the row is computed.
template <class Type, bool kTeacher = true>
FASTKD_DEVICE Share<Type, kTeacher> share_of(const Team& team, const RowLossArguments& arguments, const Rows& rows,
                                             int64_t index, RowKind kind) {
  return Share<Type, kTeacher>(team, arguments.plan, rows.student, rows.teacher, index,
                               kind == RowKind::kComputed ? int(rows.classes) : 0);
}

FASTKD_DEVICE void write_losses(const Team& team, const Rows& rows, int64_t index, float loss,
                                const float (&terms)[kTerms]) {
  if (team.member() != 0) return;
  rows.losses[index] = loss;
  if (rows.terms == nullptr) return;
#pragma unroll
  for (int term = 0; term < kTerms; term++) rows.terms[term * rows.term_stride + index] = terms[term];
}

// Fills loss, terms and gradient: with 0 if the weight is 0, with NaN if the label is out of range.
template <class Type>
FASTKD_DEVICE void write_uncomputed(const Team& team, const Rows& rows, int64_t index, RowKind kind) {
  if (kind == RowKind::kPastEnd) return;
  const float value = kind == RowKind::kIgnored ? 0.0f : as_float(0x7fc00000u);
  write_losses(team, rows, index, value, {value, value, value, value});
  if (rows.gradient.data == nullptr) return;
  const int phase = phase_of(row_of<Type>(rows.gradient, index)), classes = int(rows.classes);
  const RowPointer<Type> gradient = row_of<Type>(rows.gradient, index, phase, classes);
  float values[kVector];
  for (int i = 0; i < kVector; i++) values[i] = value;
#pragma unroll 1
  for (int64_t column = int64_t(team.member()) * kVector - phase; column < classes; column += team.size() * kVector)
    store_vector(gradient, int(column), classes, values);
}

// The gradient's row, with the vectors of the student's.
template <class Type, bool kTeacher>
FASTKD_DEVICE RowPointer<Type> gradient_row(const Rows& rows, int64_t index, const Share<Type, kTeacher>& share) {
  return row_of<Type>(rows.gradient, index, share.phase(), int(rows.classes));
}

}  // namespace cuda
}  // namespace fastkd

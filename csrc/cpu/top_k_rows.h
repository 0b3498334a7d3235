// Rows whose teacher is known at K classes: from C classes to K + 1 and back.
//
// A first pass over the student's logits sums the exponentials of the rest, the classes that are not known. Its log-sum
// and the known logits are a row of K + 1 classes, for which the kernels of the loss compute value and gradient. The
// second pass gives each class of the rest its share of the rest's gradient, and the known classes theirs.
#pragma once

#include "row_kernels.h"

namespace fastkd {
namespace FASTKD_ISA {

// A row, and the sums of its first pass. "The others" are the classes that are not known, without the label if there is
// a cross-entropy: it belongs to the rest, but not to the sum at T = 1.
struct TopKRow {
  const Rows* rows;
  const int64_t* known;        // [count], in ascending order
  int64_t count, index;        // index: of the row
  int64_t label, label_at;     // the label's class, and its place among the known; -1: none
  bool cross_entropy, smoothing;
  bool at_t1;                  // the cross-entropy needs exponentials of its own
  Exponent exponent;
  double slope;
  // [count + 1], padded to lines: logits, T log q, the gradient, exponentials at T = 1.
  float *student, *relative, *gradient, *known_exp_z;
  float *exp_u, *exp_z, *bases;  // of the others, and the base of each block; null: computed again
  float label_logit, origin;
  float base;                  // the largest logit of the others
  double sum, sum_t1;          // of their exponentials, relative to it
  double logit_sum;            // of all classes, relative to `origin`
};

FASTKD_INLINE double exp_of(double x) { return x == 0 ? 1.0 : __builtin_exp(x); }

// Loads a block of the row and masks all but the others. `next` is the first known class from the block on; it and those
// after it in the block are copied to row.student. Returns the padded length; `top` includes the others.
FASTKD_INLINE int load_others(TopKRow& row, int64_t offset, int n, int64_t& next, float* z, vf& top) {
  const vf before = top;
  const int padded = load_block(row.rows->student, row.index, offset, n, z, kMasked, top);
  if (row.smoothing) row.logit_sum += sum_of_block(z, n, row.origin);
  bool masks = false;
  for (; next < row.count && row.known[next] < offset + n; next++) {
    float& logit = z[row.known[next] - offset];
    row.student[next] = logit;
    logit = kMasked, masks = true;
  }
  if (row.cross_entropy && row.label >= offset && row.label < offset + n) {
    float& logit = z[row.label - offset];
    row.label_logit = row.label_at >= 0 ? row.student[row.label_at] : logit;
    logit = kMasked, masks = true;
  }
  if (masks) {
    top = before;
    for (int i = 0; i < padded; i += kLanes) top = at_least(load(z + i), top);
  }
  return padded;
}

static void sum_others(TopKRow& row) {
  float z[kBlock], uncached_u[kBlock], uncached_z[kBlock];
  const Rows& rows = *row.rows;
  int64_t next = 0;
  row.base = kMasked, row.sum = row.sum_t1 = 0;
  for (int64_t offset = 0; offset < rows.classes; offset += kBlock) {
    vf top = broadcast(row.base);
    const int padded = load_others(row, offset, block_size(rows.classes, offset), next, z, top);
    const float base = horizontal_max(top);
    if (base > row.base) {
      const double below = double(row.base) - base;
      row.sum *= exp_of(below * row.slope);
      row.sum_t1 *= exp_of(below);
      row.base = base;
    }
    const Prefetch following = prefetch_next_block(rows.student, rows, row.index, offset);
    const Prefetch written = prefetch_at(rows.gradient, row.index, offset);
    const bool caches = row.exp_u != nullptr, writes = rows.gradient.data != nullptr;
    float *const to_u = caches ? row.exp_u + offset : uncached_u, *const to_z = caches ? row.exp_z + offset : uncached_z;
    const vf from = broadcast(row.base);
    vf sum = {}, sum_t1 = {};
    for (int part = 0; part < padded; part += kPart) {
      vf part_sum = {}, part_sum_t1 = {};
      for (int i = part; i < end_of_part(part, padded); i += kLanes) {
        if (i % kLine == 0) {
          prefetch(following, i);
          if (writes) prefetch_for_write(written, i);
        }
        const vf x = load(z + i) - from, exp_u = exp_or_zero(x, row.exponent);
        store(to_u + i, exp_u);
        part_sum += exp_u;
        if (!row.at_t1) continue;
        const vf exp_z = exp_or_zero(x);
        store(to_z + i, exp_z);
        part_sum_t1 += exp_z;
      }
      sum += part_sum, sum_t1 += part_sum_t1;
    }
    row.sum += horizontal_sum(sum);
    row.sum_t1 += horizontal_sum(sum_t1);
    if (row.bases != nullptr) row.bases[offset / kBlock] = row.base;
  }
  // If all are masked, each class counts 1 here, those left out too.
  if (!row.at_t1) row.sum_t1 = row.sum;
}

// What the second pass writes: at the others `rest` e^u + `t1` e^z + `constant`, with exponentials relative to the base
// of the others; at a label that is not known `label`. Row::gradient has what the known classes get.
struct TopKGradient {
  double rest, t1, constant, label;
};

// The cross-entropy of the whole row: its value, weighted, and its part of the gradient.
static double add_cross_entropy(const TopKRow& row, const LossOptions& options, double weight, TopKGradient& gradient) {
  Row<double> whole{};
  float base = row.base;
  for (int64_t i = 0; i < row.count; i++)
    if (i != row.label_at && row.student[i] > base) base = row.student[i];
  double sum = row.sum_t1 * exp_of(double(row.base) - base);
  for (int64_t i = 0; i < row.count; i += kLanes) store(row.known_exp_z + i, exp_or_zero(load(row.student + i) - base));
  for (int64_t i = 0; i < row.count; i++)
    if (i != row.label_at) sum += row.known_exp_z[i];
  whole.sums.max_s = base, whole.sums.t1_s = sum, whole.sums.logit_sum = row.logit_sum;
  whole.label = {true, row.label_logit, 0.0f};
  whole.origin = row.origin;
  whole.classes = row.rows->classes;
  LossOptions of_student = options;
  of_student.needs &= kCrossEntropy | kLabelSmoothing;
  const SoftmaxResult<double> result = formula_of<Softmax>(of_student, whole);
  const SoftmaxGradient<double>& g = result.gradient;
  const double t1 = weight * g.student_t1;
  gradient.t1 = t1 * exp_of(double(row.base) - base);
  gradient.constant = weight * g.constant, gradient.label = weight * g.label;
  if (row.rows->gradient.data != nullptr)
    for (int64_t i = 0; i < row.count; i++)
      row.gradient[i] += float(i == row.label_at ? gradient.label : t1 * row.known_exp_z[i] + gradient.constant);
  if (row.rows->terms != nullptr) row.rows->terms[row.index] += float(weight * result.terms[0]);
  return weight * result.loss;
}

// From the last block, which is still in cache.
static void write_gradient(TopKRow& row, const TopKGradient& g) {
  float z[kBlock], again_u[kBlock], again_z[kBlock];
  const Rows& rows = *row.rows;
  const vf constant = broadcast(float(g.constant));
  for (int64_t block = (rows.classes - 1) / kBlock; block >= 0; block--) {
    const int64_t offset = block * kBlock;
    const int n = block_size(rows.classes, offset);
    const float *exp_u = row.exp_u + offset, *exp_z = row.exp_z + offset;
    double below = 0;
    if (row.exp_u == nullptr) {
      const int padded = load_block(rows.student, row.index, offset, n, z);
      for (int i = 0; i < padded; i += kLanes) {
        const vf x = load(z + i) - broadcast(row.base);  // of a known class perhaps too large: overwritten below
        store(again_u + i, exp_or_zero(x, row.exponent));
        if (row.at_t1) store(again_z + i, exp_or_zero(x));
      }
      exp_u = again_u, exp_z = again_z;
    } else {
      below = double(row.bases[block]) - row.base;
    }
    const vf a = broadcast(float(g.rest * exp_of(below * row.slope) + (row.at_t1 ? 0 : g.t1 * exp_of(below))));
    const vf b = broadcast(float(g.t1 * exp_of(below)));
    store_block(rows.gradient, row.index, offset, n, [&](int i) __attribute__((always_inline)) {
      const vf value = a * load(exp_u + i) + constant;
      return row.at_t1 ? value + b * load(exp_z + i) : value;
    });
  }
  with_element(rows.gradient.dtype, [&](auto element) __attribute__((always_inline)) {
    typedef decltype(element) E;
    typename E::type *to = element_at<E>(rows.gradient, row.index, 0), values[kLanes];
    for (int64_t i = 0; i < row.count; i += kLanes) {
      E::store(values, load(row.gradient + i));
      for (int64_t j = 0; j < kLanes && i + j < row.count; j++) to[row.known[i + j]] = values[j];
    }
  });
  if (row.cross_entropy && row.label_at < 0) fill_row(rows.gradient, row.index, row.label, 1, float(g.label));
}

// Where `label` is among `count` ascending classes; -1: nowhere.
static int64_t place_of(int64_t label, const int64_t* known, int64_t count) {
  const int64_t place = first_known<int64_t>(known, 0, count, label);
  return place < count && known[place] == label ? place : -1;
}

// Whether all rows are what top_k_loss expects: ascending indices in range, log-probabilities of at most 0 whose
// probabilities sum to at most `most`, and the label, if there are labels, among the indices. NaN passes.
static bool top_k_ready(const int64_t* indices, const float* log_probs, const int64_t* labels, int64_t rows,
                        int64_t count, int64_t classes, float most) {
  bool ready = true;
  for (int64_t row = 0; row < rows && ready; row++, indices += count, log_probs += count) {
    ready = indices[0] >= 0 && indices[count - 1] < classes;
    for (int64_t i = 1; i < count; i++) ready &= indices[i - 1] < indices[i];
    float tail[kLanes];
    vf sums = {}, top = broadcast(-1.0f);
    for (int64_t i = 0; i < count; i += kLanes) {
      const float* from = log_probs + i;
      if (i + kLanes > count) {
        for (int64_t j = 0; j < kLanes; j++) tail[j] = i + j < count ? from[j] : kMasked;
        from = tail;
      }
      const vf x = load(from);
      top = at_least(x, top);
      sums += exp_or_zero(x);
    }
    ready &= !(horizontal_max(top) > 0) && !(horizontal_sum(sums) > most);
    if (labels != nullptr) ready &= place_of(labels[row], indices, count) >= 0;
  }
  return ready;
}

// The loss over K + 1 classes: value, terms, and the gradient of each. `sum`: of the rest, relative to `base`.
static void small_loss(const TopKRow& row, const Known& known, const LossOptions& options, float base, double sum) {
  const Rows& rows = *row.rows;
  // T log q, as the teacher's are T log p: rounding then is as small as the classes' shares, and as their differences.
  const bool masked = base == kMasked && sum == sum;
  const double rest = masked ? kMasked : base + __builtin_log(sum) / row.slope;
  double largest = rest;
  for (int64_t i = 0; i < row.count; i++)
    if (row.student[i] > largest) largest = row.student[i];
  const vf from = broadcast(float(largest));
  for (int64_t i = 0; i < row.count; i += kLanes)
    store(row.relative + i, exp_or_zero(load(row.student + i) - from, row.exponent));
  double total = masked ? 0 : exp_of((rest - largest) * row.slope);
  for (int64_t i = 0; i < row.count; i++) total += row.relative[i];
  const double log_sum = total > 0 ? largest + __builtin_log(total) / row.slope : largest;
  for (int64_t i = 0; i < row.count; i++)
    row.relative[i] = row.student[i] == kMasked ? kMasked : float(row.student[i] - log_sum);
  row.relative[row.count] = masked ? kMasked : float(rest - log_sum);
  Rows small{};
  small.student = {row.relative, 0, INT64_MAX, 0, DType::kFloat};
  small.teacher = rows.teacher;
  small.teacher.data = element_at<Element<DType::kFloat>>(rows.teacher, row.index, 0);
  if (rows.gradient.data != nullptr) small.gradient = {row.gradient, 0, INT64_MAX, 0, DType::kFloat};
  small.count = 1, small.classes = row.count + 1;
  if (known.needs & kLabelled) small.target = &row.label_at;
  small.scale = weight_of(rows, row.index);
  small.losses = rows.losses + row.index;
  if (rows.terms != nullptr) small.terms = rows.terms + row.index, small.term_stride = rows.term_stride;
  row_loss(small, options_at_k(options, known.needs), 0, 1);
  if (rows.gradient.data == nullptr || row.relative[row.count] * row.slope < -0.7) return;
  // A gradient of logits sums to 0. Of a class with most of the probability it is itself a difference that cancels.
  double others = 0;
  for (int64_t i = 0; i < row.count; i++) others += row.gradient[i];
  row.gradient[row.count] = float(-others);
}

static void top_k_loss(const Rows& rows, const Known& known, const LossOptions& options, int64_t begin, int64_t end) {
  const int64_t blocks = (rows.classes + kBlock - 1) / kBlock, floats = blocks * kBlock;
  const int64_t small = (known.count + 1 + kLine - 1) / kLine * kLine;
  const bool at_t1 = (options.needs & kStudentAtT1) != 0;
  const bool caches = rows.gradient.data != nullptr && (at_t1 ? 2 : 1) * floats <= kMaxCachedFloats;
  float* memory = scratch(kTopKScratch, 4 * small + (caches ? (at_t1 ? 2 : 1) * floats + blocks : 0));
  for (int64_t index = begin; index < end; index++) {
    TopKRow row{&rows, known.indices + index * known.stride, known.count, index, -1, -1};
    const double weight = weight_of(rows, index);
    if (weight == 0) {
      write_uncomputed(rows, index, 0.0f);
      continue;
    }
    if ((options.needs & kLabelled) && rows.target != nullptr) {
      row.label = rows.target[index * rows.target_stride];
      row.label_at = place_of(row.label, row.known, row.count);
    }
    const bool labelled = row.label >= 0 && row.label < rows.classes;
    if (memory == nullptr || (rows.target != nullptr && (options.needs & kLabelled) && !labelled)) {
      write_uncomputed(rows, index, __builtin_nanf(""));
      continue;
    }
    row.student = memory, row.relative = memory + small, row.gradient = memory + 2 * small;
    row.known_exp_z = memory + 3 * small;
    if (caches) {
      row.bases = memory + 4 * small;
      row.exp_u = row.bases + blocks, row.exp_z = row.exp_u + (at_t1 ? floats : 0);
    }
    row.cross_entropy = (options.needs & kCrossEntropy) != 0, row.at_t1 = at_t1;
    row.smoothing = (options.needs & kLabelSmoothing) != 0;
    if (row.smoothing) row.origin = first_logit(rows.student, index);
    double teacher_slope;
    slopes_of(options, row.slope, teacher_slope);
    row.exponent = exponent_of(row.slope);
    sum_others(row);

    // The rest is the others, and the label if it was left out.
    float base = row.base;
    double sum = row.sum;
    const bool label_in_rest = row.cross_entropy && row.label_at < 0;
    if (label_in_rest) {
      base = row.label_logit > row.base ? row.label_logit : row.base;
      sum = row.sum * exp_of((double(row.base) - base) * row.slope) +
            __builtin_exp((double(row.label_logit) - base) * row.slope);
    }
    small_loss(row, known, options, base, sum);
    TopKGradient gradient{};
    if (row.cross_entropy) rows.losses[index] += float(add_cross_entropy(row, options, weight, gradient));
    if (rows.gradient.data == nullptr) continue;
    const double share = row.gradient[row.count] / sum;  // of the rest's gradient, relative to `base`
    gradient.rest = share * exp_of((double(row.base) - base) * row.slope);
    if (label_in_rest) gradient.label += share * __builtin_exp((double(row.label_logit) - base) * row.slope);
    write_gradient(row, gradient);
  }
}

}  // namespace FASTKD_ISA
}  // namespace fastkd

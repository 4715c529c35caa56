// What every kernel and the bindings share. Letters: N rows, V vocabulary, G groups.
//
// Included by units that are compiled for one instruction set, so it must define no function: the linker
// would keep a single copy of an inline one, possibly made of instructions the machine lacks.
#pragma once

#include <cstdint>

namespace rd {

enum class DType { kFloat32, kBFloat16, kFloat16 };  // float16 on GPUs only

// What became of a row in the row pass. The numbers are known to the Python side.
enum Outcome : uint8_t { kMiss = 0, kHit = 1, kIgnored = 2, kBadLabel = 3 };

// Logits [N, V] with unit stride along V, any row stride (0: one row expanded), and their labels [N].
struct Rows {
  void* logits;
  DType dtype;
  int64_t count;       // N
  int64_t vocabulary;  // V
  int64_t stride;      // elements from one row to the next
  const int64_t* labels;
  int64_t ignore_index;
};

// The target distribution of a row with label y: (1 - smoothing) w_y onehot(y) + smoothing / V * w.
struct Target {
  const float* class_weight;  // w [V]; null: ones
  double class_weight_sum;    // W = sum_j w_j
  double smoothing;
};

// A row's largest logit m and log sum_j exp(z_j - m), each [N]. Their sum, the log-sum-exp, would be rounded
// to the precision of m, and every probability with it.
struct Normaliser {
  float* maximum;
  float* log_sum;
};

// What a row pass tells of a row beside its loss, each [N]; null: not asked for.
struct Details {
  float* entropy;  // -sum_j p_j log p_j of the softmax, in nats
  float* above;    // how many logits are not <= the label's
};

// Results of the row pass, each [N].
struct RowResults {
  float* loss;
  Normaliser normaliser;
  uint8_t* outcome;
  Details details;
};

// What the backward pass needs besides the rows. A null factor counts as 1.
struct RowGradient {
  const float* grad_out;  // [N] with grad_out_stride, 0 for a scalar
  int64_t grad_out_stride;
  const float* row_scale;  // [N]
  Normaliser normaliser;
  void* out;  // [N, V] in the logits' dtype; may be the logits
  int64_t out_stride;
  bool stream;  // write past the cache: pays for a large `out` that has its pages already
};

// Groups of the rows, `width` numbers a row; either `lists` or `bits` is null.
struct Groups {
  const int64_t* lists;  // [N, width] ids, -1: none; a group that a row names twice counts once
  const uint32_t* bits;  // [N, width] with bit g % 32 of word g / 32 set where the row is in group g
  int64_t width;         // of bits: G / 32, rounded up
  int64_t count;         // G
};

// kGroupDroHold: groups absent from the batch keep their q, and the others share the rest. kTilted...:
// weights proportional to exp(rate m_g), times n_g or not. kWorstGroup: the largest mean loss, ties sharing.
enum class Objective { kErm, kGroupDro, kGroupDroHold, kTiltedRows, kTiltedGroups, kWorstGroup };

struct Update {
  Objective objective;
  double rate;              // step size or tilt
  const float* adjustment;  // [G], added to the mean losses of present groups; null: 0
  float* q;                 // [G], updated in place
};

// What the rows of stats [4, G+2] hold. Columns: the groups, labelled rows in no group, all labelled rows.
enum StatsRow { kLossSum = 0, kCount = 1, kHits = 2, kWeight = 3 };

struct Statistics {
  float* stats;
  int64_t* status;  // [2]: labels out of range, group ids out of range
};

}  // namespace rd

#include "cpu/groups.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/rows.h"

namespace rd::cpu {
namespace {

bool counts(uint8_t outcome) { return outcome == kMiss || outcome == kHit; }

// visit(begin, end) for the stretches of a row's mask [G] that hold a group; most rows are in few.
template <class Visit>
void for_stretches(const bool* member, int64_t num_groups, const Visit& visit) {
  for (int64_t begin = 0; begin < num_groups; begin += 8) {
    uint64_t word = 0;
    const int64_t count = std::min<int64_t>(8, num_groups - begin);
    std::memcpy(&word, member + begin, static_cast<std::size_t>(count));
    if (word != 0) visit(begin, begin + count);
  }
}

// Exponentiated gradient (Sagawa et al. 2020, Algorithm 1) in log space. Groups absent from the batch keep
// their q up to normalisation, or, with kGroupDroHold, as it is. Nothing changes if a present group's mean
// loss is not finite, or if the groups to be updated have no weight to share.
void update_q(const float* loss_sum, const float* count, int64_t num_groups, const Update& update) {
  const bool hold = update.objective == Objective::kGroupDroHold;
  std::vector<double> log_q(num_groups);
  double largest = -std::numeric_limits<double>::infinity(), shared = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    if (hold && count[g] == 0) continue;
    log_q[g] = std::log(static_cast<double>(update.q[g]));
    shared += update.q[g];
    if (count[g] > 0) {
      const double mean = static_cast<double>(loss_sum[g]) / count[g];
      if (!std::isfinite(mean)) return;
      log_q[g] += update.step_size * (mean + (update.adjustment ? update.adjustment[g] : 0.0f));
    }
    largest = std::max(largest, log_q[g]);
  }
  if (hold && !(shared > 0)) return;
  double total = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    if (!hold || count[g] > 0) total += log_q[g] = std::exp(log_q[g] - largest);
  }
  for (int64_t g = 0; g < num_groups; ++g) {
    if (!hold || count[g] > 0) update.q[g] = static_cast<float>((hold ? shared : 1) * log_q[g] / total);
  }
}

}  // namespace

void group_reduce(const float* row_loss, const uint8_t* outcome, int64_t rows, const Groups& groups,
                  const Statistics& statistics) {
  struct Total {
    double loss = 0, count = 0, hits = 0;
    void add(float row_loss, bool hit) { loss += row_loss, count += 1, hits += hit; }
  };
  const int64_t columns = groups.count + 2;
  std::vector<Total> totals(columns);
  Total &ungrouped = totals[groups.count], &overall = totals[groups.count + 1];
  int64_t bad_labels = 0, bad_groups = 0;
  for (int64_t i = 0; i < rows; ++i) {
    bad_labels += outcome[i] == kBadLabel;
    if (!counts(outcome[i])) continue;
    const bool hit = outcome[i] == kHit;
    overall.add(row_loss[i], hit);
    if (groups.ids != nullptr) {
      const int64_t id = groups.ids[i];
      if (id >= 0 && id < groups.count) {
        totals[id].add(row_loss[i], hit);
      } else if (id == -1) {
        ungrouped.add(row_loss[i], hit);
      } else {
        ++bad_groups;
      }
    } else {
      const bool* member = groups.mask + i * groups.count;
      bool any = false;
      const double share[2] = {0, row_loss[i]};
      for_stretches(member, groups.count, [&](int64_t begin, int64_t end) {
        any = true;
        for (int64_t g = begin; g < end; ++g) {  // without branches, which a dense mask would mispredict
          totals[g].loss += share[member[g]];
          totals[g].count += member[g];
          totals[g].hits += member[g] & hit;
        }
      });
      if (!any) ungrouped.add(row_loss[i], hit);
    }
  }
  float* stats = statistics.stats;
  for (int64_t c = 0; c < columns; ++c) {
    stats[kLossSum * columns + c] = static_cast<float>(totals[c].loss);
    stats[kCount * columns + c] = static_cast<float>(totals[c].count);
    stats[kHits * columns + c] = static_cast<float>(totals[c].hits);
    stats[kWeight * columns + c] = 0;
  }
  statistics.status[0] = bad_labels;
  statistics.status[1] = bad_groups;
}

void group_update(const Statistics& statistics, int64_t num_groups, const Update& update, float* loss,
                  float* coefficients) {
  const int64_t columns = num_groups + 2;
  const float* loss_sum = statistics.stats + kLossSum * columns;
  const float* count = statistics.stats + kCount * columns;
  float* weight = statistics.stats + kWeight * columns;
  std::fill(weight, weight + columns, 0.0f);
  std::fill(coefficients, coefficients + num_groups, 0.0f);
  *loss = std::numeric_limits<float>::quiet_NaN();
  if (statistics.status[0] != 0 || statistics.status[1] != 0) return;

  double rows = 0, total_loss = 0, total_weight = 0;
  for (int64_t g = 0; g < num_groups; ++g) rows += count[g];
  const bool is_erm = update.objective == Objective::kErm;
  if (!is_erm && rows > 0) update_q(loss_sum, count, num_groups, update);
  for (int64_t g = 0; g < num_groups; ++g) {
    double coefficient = 0;
    if (is_erm && rows > 0) coefficient = 1 / rows;
    if (!is_erm && count[g] > 0) coefficient = static_cast<double>(update.q[g]) / count[g];
    const double group_weight = is_erm ? coefficient * count[g] : update.q[g];
    coefficients[g] = static_cast<float>(coefficient);
    weight[g] = static_cast<float>(group_weight);
    total_weight += group_weight;
    if (count[g] > 0) total_loss += coefficient * loss_sum[g];
  }
  weight[num_groups + 1] = static_cast<float>(total_weight);
  *loss = static_cast<float>(total_loss);
}

void row_scale(const float* coefficients, const uint8_t* outcome, int64_t rows, const Groups& groups,
               float* scale) {
  for (int64_t i = 0; i < rows; ++i) {
    double sum = 0;
    if (counts(outcome[i])) {
      if (groups.ids != nullptr) {
        const int64_t id = groups.ids[i];
        if (id >= 0 && id < groups.count) sum = coefficients[id];
      } else {
        const bool* member = groups.mask + i * groups.count;
        for_stretches(member, groups.count, [&](int64_t begin, int64_t end) {
          for (int64_t g = begin; g < end; ++g) {
            const float share[2] = {0, coefficients[g]};
            sum += share[member[g]];
          }
        });
      }
    }
    scale[i] = static_cast<float>(sum);
  }
}

void grouped_forward(const Rows& rows, const Groups& groups, const Update& update,
                     const Statistics& statistics, float* loss, float* scale, const Normaliser& normaliser,
                     int threads) {
  std::vector<float> row_loss(rows.count), coefficients(groups.count);
  std::vector<uint8_t> outcome(rows.count);
  row_forward(rows, {}, {row_loss.data(), normaliser, outcome.data()}, threads);
  group_reduce(row_loss.data(), outcome.data(), rows.count, groups, statistics);
  group_update(statistics, groups.count, update, loss, coefficients.data());
  row_scale(coefficients.data(), outcome.data(), rows.count, groups, scale);
}

}  // namespace rd::cpu

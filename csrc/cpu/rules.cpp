#include "cpu/rules.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace rd::cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The sums over a batch, each [G].
struct Batch {
  const float* loss_sum;
  const float* count;
  int64_t num_groups;

  bool has(int64_t g) const { return count[g] > 0; }
  double mean(int64_t g) const { return static_cast<double>(loss_sum[g]) / count[g]; }  // of a group it has
  bool is_finite() const {
    return std::all_of(loss_sum, loss_sum + num_groups, [](float sum) { return std::isfinite(sum); });
  }
};

// Exponentiated gradient (Sagawa et al. 2020, Algorithm 1) in log space. Groups absent from the batch keep
// their q up to normalisation, or, with kGroupDroHold, as it is. Nothing changes if no group is present, if
// one's mean loss is not finite, or if the groups to be updated have no weight to share.
void update_q(const Batch& batch, const Update& update) {
  if (!batch.is_finite()) return;
  const int64_t num_groups = batch.num_groups;
  const bool hold = update.objective == Objective::kGroupDroHold;
  std::vector<double> log_q(num_groups);
  double largest = -kInfinity, shared = 0;
  bool any = false;
  for (int64_t g = 0; g < num_groups; ++g) {
    any |= batch.has(g);
    if (hold && !batch.has(g)) continue;
    log_q[g] = std::log(static_cast<double>(update.q[g]));
    shared += update.q[g];
    if (batch.has(g)) {
      log_q[g] += update.rate * (batch.mean(g) + (update.adjustment ? update.adjustment[g] : 0.0f));
    }
    largest = std::max(largest, log_q[g]);
  }
  if (!any || (hold && !(shared > 0))) return;
  double total = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    if (!hold || batch.has(g)) total += log_q[g] = std::exp(log_q[g] - largest);
  }
  for (int64_t g = 0; g < num_groups; ++g) {
    if (!hold || batch.has(g)) update.q[g] = static_cast<float>((hold ? shared : 1) * log_q[g] / total);
  }
}

// What is proportional to the weight of a present group, by the rules without state. Where a loss sum is not
// finite, neither is the loss, and the groups weigh what they do with a tilt of 0, or where all are tied.
std::vector<double> proportions(const Batch& batch, const Update& update) {
  std::vector<double> result(batch.num_groups);
  const bool is_finite = batch.is_finite(), by_rows = update.objective == Objective::kTiltedRows;
  const auto exponent = [&](int64_t g) {
    return (is_finite ? update.rate * batch.mean(g) : 0) +
           (by_rows ? std::log(static_cast<double>(batch.count[g])) : 0);
  };
  double worst = -kInfinity, largest = -kInfinity;
  for (int64_t g = 0; g < batch.num_groups; ++g) {
    if (!batch.has(g)) continue;
    worst = std::max(worst, batch.mean(g));
    largest = std::max(largest, exponent(g));
  }
  for (int64_t g = 0; g < batch.num_groups; ++g) {
    if (!batch.has(g)) continue;
    if (update.objective == Objective::kErm) {
      result[g] = batch.count[g];
    } else if (update.objective == Objective::kWorstGroup) {
      result[g] = !is_finite || batch.mean(g) == worst;
    } else {
      result[g] = std::exp(exponent(g) - largest);
    }
  }
  return result;
}

// The weights of the groups [G], for which Group DRO updates q. Zeros where no group is present, but for q.
std::vector<double> weights_of(const Batch& batch, const Update& update) {
  if (update.objective == Objective::kGroupDro || update.objective == Objective::kGroupDroHold) {
    update_q(batch, update);
    return {update.q, update.q + batch.num_groups};
  }
  std::vector<double> weights = proportions(batch, update);
  double total = 0;
  for (const double weight : weights) total += weight;
  for (double& weight : weights) weight = total > 0 ? weight / total : 0;
  return weights;
}

}  // namespace

void group_update(const Statistics& statistics, int64_t num_groups, const Update& update, float* loss,
                  float* coefficients) {
  const int64_t columns = num_groups + 2;
  const Batch batch = {statistics.stats + kLossSum * columns, statistics.stats + kCount * columns,
                       num_groups};
  float* weight = statistics.stats + kWeight * columns;
  std::fill(weight, weight + columns, 0.0f);
  std::fill(coefficients, coefficients + num_groups, 0.0f);
  *loss = std::numeric_limits<float>::quiet_NaN();
  if (statistics.status[0] != 0 || statistics.status[1] != 0) return;

  const std::vector<double> weights = weights_of(batch, update);
  double total_loss = 0, total_weight = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    weight[g] = static_cast<float>(weights[g]);
    total_weight += weights[g];
    if (!batch.has(g)) continue;
    const double coefficient = weights[g] / batch.count[g];
    coefficients[g] = static_cast<float>(coefficient);
    total_loss += coefficient * batch.loss_sum[g];
  }
  weight[num_groups + 1] = static_cast<float>(total_weight);
  *loss = static_cast<float>(total_loss);
}

}  // namespace rd::cpu

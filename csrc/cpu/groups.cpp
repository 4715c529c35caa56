#include "cpu/groups.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/rows.h"
#include "cpu/rules.h"

namespace rd::cpu {
namespace {

bool counts(uint8_t outcome) { return outcome == kMiss || outcome == kHit; }

bool are_ids(const Groups& groups) { return groups.lists != nullptr && groups.width == 1; }

// Remembers which groups a row has named.
class Named {
 public:
  explicit Named(const Groups& groups) : last_row_(groups.lists && !are_ids(groups) ? groups.count : 0, -1) {}

  bool first(int64_t row, int64_t id) { return std::exchange(last_row_[id], row) != row; }

 private:
  std::vector<int64_t> last_row_;
};

// visit(id) for each group of a row's list, once. Returns whether all its ids are in [-1, G).
template <class Visit>
bool for_list(const Groups& groups, int64_t row, Named& named, const Visit& visit) {
  bool inside = true;
  for (int64_t k = 0; k < groups.width; ++k) {
    const int64_t id = groups.lists[row * groups.width + k];
    if (id >= 0 && id < groups.count) {
      if (named.first(row, id)) visit(id);
    } else {
      inside &= id == -1;
    }
  }
  return inside;
}

// Bits are taken four at a time: what is summed, or looked up, for each of the 16 patterns of four groups
// costs the same for a row in many groups as for one in few, and the processor has no branches to guess but
// for empty words.
constexpr int64_t kBits = 4, kPatterns = 1 << kBits;

int64_t patterns_of(const Groups& groups) {
  return groups.bits ? groups.width * (32 / kBits) * kPatterns : 0;
}

// visit(place) for the patterns of a row, at 16 times their number in the row plus their value; words that
// hold no group are left out.
template <class Visit>
void for_patterns(const Groups& groups, int64_t row, const Visit& visit) {
  const int64_t all = (groups.count + kBits - 1) / kBits * kPatterns;
  const uint32_t* words = groups.bits + row * groups.width;
  for (int64_t begin = 0; begin < all; begin += 32 / kBits * kPatterns) {
    uint32_t word = *words++;
    if (word == 0) continue;
    const int64_t end = std::min(begin + 32 / kBits * kPatterns, all);
    for (int64_t place = begin; place < end; place += kPatterns, word >>= kBits) {
      visit(place + word % kPatterns);
    }
  }
}

struct Total {
  double loss = 0, count = 0, hits = 0;

  void add(float row_loss, bool hit) { loss += row_loss, count += 1, hits += hit; }
  void add(const Total& other) { loss += other.loss, count += other.count, hits += other.hits; }
};

}  // namespace

void group_reduce(const float* row_loss, const uint8_t* outcome, int64_t rows, const Groups& groups,
                  const Statistics& statistics) {
  const int64_t columns = groups.count + 2;
  std::vector<Total> totals(columns), patterns(patterns_of(groups));
  Total &ungrouped = totals[groups.count], &overall = totals[groups.count + 1];
  Named named(groups);
  int64_t bad_labels = 0, bad_groups = 0;
  for (int64_t i = 0; i < rows; ++i) {
    bad_labels += outcome[i] == kBadLabel;
    if (!counts(outcome[i])) continue;
    const bool hit = outcome[i] == kHit;
    bool inside = true, any = false;
    overall.add(row_loss[i], hit);
    if (are_ids(groups)) {
      const int64_t id = groups.lists[i];
      if (id >= 0 && id < groups.count) {
        totals[id].add(row_loss[i], hit);
        continue;
      }
      inside = id == -1;
    } else if (groups.lists != nullptr) {
      inside = for_list(groups, i, named, [&](int64_t id) { totals[id].add(row_loss[i], hit), any = true; });
    } else {
      for_patterns(groups, i, [&](int64_t place) { patterns[place].add(row_loss[i], hit), any = true; });
    }
    bad_groups += !inside;
    if (inside && !any) ungrouped.add(row_loss[i], hit);
  }
  if (groups.bits != nullptr) {
    for (int64_t g = 0; g < groups.count; ++g) {
      for (int64_t p = 0; p < kPatterns; ++p) {
        if (p >> g % kBits & 1) totals[g].add(patterns[g / kBits * kPatterns + p]);
      }
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

void row_scale(const float* coefficients, const uint8_t* outcome, int64_t rows, const Groups& groups,
               float* scale) {
  std::vector<double> sums(patterns_of(groups));
  if (groups.bits != nullptr) {
    for (int64_t g = 0; g < groups.count; ++g) {
      for (int64_t p = 0; p < kPatterns; ++p) {
        if (p >> g % kBits & 1) sums[g / kBits * kPatterns + p] += coefficients[g];
      }
    }
  }
  Named named(groups);
  for (int64_t i = 0; i < rows; ++i) {
    double sum = 0;
    if (counts(outcome[i])) {
      if (are_ids(groups)) {
        const int64_t id = groups.lists[i];
        if (id >= 0 && id < groups.count) sum = coefficients[id];
      } else if (groups.lists != nullptr) {
        for_list(groups, i, named, [&](int64_t id) { sum += coefficients[id]; });
      } else {
        for_patterns(groups, i, [&](int64_t place) { sum += sums[place]; });
      }
    }
    scale[i] = static_cast<float>(sum);
  }
}

void pack_mask(const uint8_t* mask, int64_t rows, int64_t num_groups, uint32_t* words) {
  const uint8_t* end = mask + rows * num_groups;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t begin = 0; begin < num_groups; begin += 32) {
      uint32_t word = 0;
      for (int64_t g = begin; g < num_groups && g < begin + 32; g += 8) {
        const uint8_t* first = mask + i * num_groups + g;
        uint64_t eight = 0;  // bytes of 0 or 1
        if (end - first >= 8) {
          std::memcpy(&eight, first, 8);
        } else {
          std::memcpy(&eight, first, static_cast<std::size_t>(end - first));
        }
        if (num_groups - g < 8) eight &= (uint64_t{1} << 8 * (num_groups - g)) - 1;  // less the next row's
        // The product moves byte k's bit to bit k of the top byte.
        word |= static_cast<uint32_t>(eight * 0x0102040810204080u >> 56) << (g - begin);
      }
      *words++ = word;
    }
  }
}

void grouped_forward(const Rows& rows, const Groups& groups, const Update& update,
                     const Statistics& statistics, float* loss, float* scale, const Normaliser& normaliser,
                     int threads) {
  std::vector<float> row_loss(rows.count), coefficients(groups.count);
  std::vector<uint8_t> outcome(rows.count);
  row_forward(rows, {}, {row_loss.data(), normaliser, outcome.data(), {}}, threads);
  group_reduce(row_loss.data(), outcome.data(), rows.count, groups, statistics);
  group_update(statistics, groups.count, update, loss, coefficients.data());
  row_scale(coefficients.data(), outcome.data(), rows.count, groups, scale);
}

}  // namespace rd::cpu

// Runs every kernel of csrc/cuda on small inputs, for the thread sanitizer: it knows when two threads of a
// block, of a cluster or of two blocks touch the same memory with nothing that orders them, whatever order
// they happened to run in.
#include <cuda_bf16.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/launch.h"

namespace {

using namespace rd;
using namespace rd::cuda;

const Queue kQueue = {0, nullptr};

float noise(int64_t i) { return static_cast<float>((i * 2654435761u) % 1009) / 100 - 5; }

struct Problem {
  int64_t rows, vocabulary, num_groups;
  bool masked;
  std::vector<__nv_bfloat16> logits, gradient;
  std::vector<int64_t> labels, lists, status;
  std::vector<float> loss, normaliser, details, coefficients, scale, stats, q, partials;
  std::vector<uint8_t> outcome, mask;
  std::vector<uint32_t> bits, bad, counters;
  float total = 0;

  Problem(int64_t n, int64_t v, int64_t g, bool is_masked)
      : rows(n),
        vocabulary(v),
        num_groups(g),
        masked(is_masked),
        logits(n * v),
        gradient(n * v),
        labels(n),
        lists(2 * n),
        status(2),
        loss(n),
        normaliser(2 * n),
        details(2 * n),
        coefficients(g),
        scale(n),
        stats(4 * (g + 2)),
        q(g, 1.0f / g),
        outcome(n),
        mask(n * g),
        bits(n * words()) {
    const int64_t chunks = n / kChunkRows + 1;
    partials.resize(chunks * 3 * (g + 2)), bad.resize(2 * chunks), counters.resize(1 + chunks);
    for (int64_t i = 0; i < n * v; ++i) logits[i] = __float2bfloat16_rn(noise(i));
    for (int64_t i = 0; i < n; ++i) labels[i] = i % 5 == 3 ? -100 : i * 7 % v;
    for (int64_t k = 0; k < 2 * n; ++k) lists[k] = k % (g + 1) - 1;
    for (int64_t i = 0; i < n * g; ++i) mask[i] = i % 3 == 0;
  }

  Rows logit_rows() {
    return {logits.data(), DType::kBFloat16, rows, vocabulary, vocabulary, labels.data(), -100};
  }
  Normaliser normaliser_rows() { return {normaliser.data(), normaliser.data() + rows}; }
  RowResults results(bool detailed = false) {
    const Details wanted = detailed ? Details{details.data(), details.data() + rows} : Details{};
    return {loss.data(), normaliser_rows(), outcome.data(), wanted};
  }
  int64_t words() const { return (num_groups + 31) / 32; }
  Groups groups() {
    return masked ? Groups{nullptr, bits.data(), words(), num_groups}
                  : Groups{lists.data(), nullptr, 2, num_groups};
  }
  Statistics statistics() { return {stats.data(), status.data()}; }
  Scratch scratch() { return {partials.data(), bad.data(), counters.data()}; }
  Update update() { return {Objective::kGroupDro, 0.1, nullptr, q.data()}; }

  void run() {
    pack_mask(kQueue, reinterpret_cast<const bool*>(mask.data()), rows, num_groups, bits.data());
    row_forward(kQueue, logit_rows(), {nullptr, nullptr, 0.1f}, results(true));
    group_reduce(kQueue, loss.data(), outcome.data(), rows, groups(), statistics(), scratch());
    group_update(kQueue, statistics(), num_groups, update(), &total, coefficients.data());
    grouped_forward(kQueue, logit_rows(), results(), groups(), update(), statistics(), &total,
                    coefficients.data(), scratch());
    row_scale(kQueue, coefficients.data(), outcome.data(), rows, groups(), scale.data());
    row_backward(kQueue, logit_rows(), {},
                 {nullptr, 0, scale.data(), normaliser_rows(), gradient.data(), vocabulary, true});
    softmax_minus_onehot(kQueue, logit_rows(), results());
    softmax_minus_onehot(kQueue, logit_rows(), results(true));
  }
};

void run_linear() {
  const int64_t rows = 1500, width = 24, capacity = 300;
  std::vector<float> x(rows * width, 1.0f), packed(capacity * width), scale(rows, 0.5f);
  std::vector<int64_t> labels(rows), index(capacity), position(rows), count(1);
  for (int64_t i = 0; i < rows; ++i) labels[i] = i % 7 == 0 ? 1 : -100;
  const Matrix all = {x.data(), DType::kFloat32, rows, width, width};
  compact(kQueue, labels.data(), rows, -100, capacity, index.data(), position.data(), count.data());
  gather_rows(kQueue, all, index.data(), {packed.data(), DType::kFloat32, capacity, width, width});
  scale_rows(kQueue, all, scale.data(), all);
}

}  // namespace

int main() {
  Problem(300, 9, 3, true).run();    // a warp for each row, three chunks
  Problem(2, 9000, 2, false).run();  // a cluster for each row
  setenv("RD_EMULATION_DEVICE", "4,8,0,166912,167936", 1);
  Problem(140, 2100, 2, false).run();  // a block for each row, two chunks; rows kept by threads
  setenv("RD_EMULATION_DEVICE", "4,8,0,4096,4096", 1);
  Problem(3, 4100, 2, false).run();  // rows read twice
  run_linear();
  printf("done\n");
}

// How rows of draft logits are ranked, checked once: what every operation that ends in a drafter's best tokens shares.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "checks.h"
#include "kernels.h"

namespace specblock {

// The best tokens of rows: index int64 [N, width], log_prob float32 [N, width], top float32 [N, num_top].
struct BestTokens {
  Tensor index, log_prob, top;
};

class RowRanking {
 public:
  // N rows of V logits, of the requests whose sampling parameters these are: as many rows of each, one after the other.
  RowRanking(int64_t N, int64_t V, const std::optional<Tensor>& noise, const std::optional<Tensor>& noise_row,
             const std::optional<Tensor>& ids, const Tensor& temperature, const Tensor& top_p, const Tensor& top_k,
             const Tensor& min_p, double scale, int64_t width, int64_t num_top)
      : rows_(N), size_(V), scale_(scale), width_(width), num_top_(num_top) {
    STD_TORCH_CHECK(width > 0 && num_top > 0 && width <= V && num_top <= V, "draft_top: more tokens wanted than there are");
    STD_TORCH_CHECK(temperature.dim() == 1, "sampling parameters must be vectors");
    const int64_t requests = temperature.size(0);
    check_sampling(temperature, top_p, top_k, min_p, requests);
    STD_TORCH_CHECK(requests > 0 ? N % requests == 0 : N == 0, "sampling parameters: as many rows of each request expected");
    each_ = requests > 0 ? N / requests : 1;
    temperature_ = read<double>(temperature);
    top_p_ = read<double>(top_p);
    min_p_ = read<double>(min_p);
    top_k_ = read<int64_t>(top_k);
    STD_TORCH_CHECK(noise.has_value() == noise_row.has_value(), "draft_top: noise and noise_row belong together");
    if (ids) {
      check(*ids, ScalarType::Long, 1, "ids");
      STD_TORCH_CHECK(ids->size(0) == V, "ids: one per logit expected");
      ids_ = read<int64_t>(*ids);
    }
    if (!noise) return;
    check_noise(*noise, *noise_row, N, ids_ ? 0 : V);
    noise_ = read<double>(*noise);
    noise_size_ = noise->size(1);
    noise_row_ = read<int64_t>(*noise_row);
    if (ids_)
      for (int64_t i = 0; i < V; i++) STD_TORCH_CHECK(ids_[i] >= 0 && ids_[i] < noise_size_, "ids are out of range");
  }

  BestTokens operator()(const float* logits) const {
    BestTokens best{torch::stable::empty({rows_, width_}, ScalarType::Long),
                    torch::stable::empty({rows_, width_}, ScalarType::Float),
                    torch::stable::empty({rows_, num_top_}, ScalarType::Float)};
    auto* index = write<int64_t>(best.index);
    auto *log_prob = write<float>(best.log_prob), *top = write<float>(best.top);
    torch::stable::parallel_for(0, rows_, (1 << 14) / size_ + 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        const int64_t b = n / each_;
        kernels().draft_top({
            .logits = logits + n * size_, .noise = noise_ ? noise_ + noise_row_[n] * noise_size_ : nullptr, .ids = ids_,
            .size = size_, .temperature = temperature_[b], .top_p = top_p_[b], .min_p = min_p_[b], .scale = scale_,
            .top_k = top_k_[b], .token = index + n * width_, .log_prob = log_prob + n * width_, .width = width_,
            .top = top + n * num_top_, .num_top = num_top_,
        });
      }
    });
    return best;
  }

 private:
  int64_t rows_, size_, each_ = 1, noise_size_ = 0;
  const double *temperature_ = nullptr, *top_p_ = nullptr, *min_p_ = nullptr, *noise_ = nullptr;
  const int64_t *top_k_ = nullptr, *noise_row_ = nullptr, *ids_ = nullptr;
  double scale_;
  int64_t width_, num_top_;
};

}  // namespace specblock

// Registers the ranking of a chain's candidates by what the token before them says.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "checks.h"
#include "pair_gains.h"

namespace {

using namespace specblock;

// One slot's candidates, W of each, ranked behind `before`; `order` is room for W.
void rank_slot(const PairGains& known, int64_t before, float strength, int64_t width, const int64_t* token,
               const float* log_prob, int64_t* to_token, float* to_log_prob, std::vector<std::pair<float, int64_t>>& order) {
  float inside = 0, total = 0;
  for (int64_t w = 0; w < width; w++) {
    inside += std::exp(log_prob[w]);
    order[w] = {log_prob[w] + strength * pair_gain(known, before, token[w]), w};
  }
  // At low temperatures scores are far from 0 on either side.
  const float outside = log_outside(inside);
  float most = outside;
  for (int64_t w = 0; w < width; w++) most = std::max(most, order[w].first);
  for (int64_t w = 0; w < width; w++) total += std::exp(order[w].first - most);
  const float normaliser = most + std::log(total + std::exp(outside - most));
  if (!std::isfinite(normaliser)) {  // a score is no number: left as it is
    std::copy_n(token, width, to_token);
    std::copy_n(log_prob, width, to_log_prob);
    return;
  }
  std::stable_sort(order.begin(), order.begin() + width, [](const auto& a, const auto& b) { return a.first > b.first; });
  for (int64_t w = 0; w < width; w++) {
    to_token[w] = token[order[w].second];
    to_log_prob[w] = order[w].first - normaliser;
  }
}

// token int64 [B, n, K, W], log_prob float32 alike, temperature float64 [B]; pairs: starts int32 [V + 1], tokens int32 and
// gains float32 [N], rest float32 [V] -> token, log_prob.
std::tuple<Tensor, Tensor> follow_chain(const Tensor& token, const Tensor& log_prob, const Tensor& temperature,
                                        const Tensor& starts, const Tensor& tokens, const Tensor& gains, const Tensor& rest,
                                        bool noisy, double weight, double scale) {
  check(token, ScalarType::Long, 4, "token");
  check(log_prob, ScalarType::Float, 4, "log_prob");
  check(temperature, ScalarType::Double, 1, "temperature");
  check(starts, ScalarType::Int, 1, "starts");
  check(tokens, ScalarType::Int, 1, "tokens");
  check(gains, ScalarType::Float, 1, "gains");
  check(rest, ScalarType::Float, 1, "rest");
  const int64_t B = token.size(0), n = token.size(1), K = token.size(2), W = token.size(3), V = rest.size(0);
  STD_TORCH_CHECK(log_prob.numel() == token.numel() && temperature.size(0) == B, "follow_chain: proposals do not fit");
  STD_TORCH_CHECK(starts.size(0) == V + 1 && gains.size(0) == tokens.size(0), "follow_chain: pairs do not fit");
  STD_TORCH_CHECK(read<int32_t>(starts)[0] >= 0 && read<int32_t>(starts)[V] <= tokens.size(0), "follow_chain: pairs are damaged");
  const PairGains known{read<int32_t>(starts), read<int32_t>(tokens), read<float>(gains), read<float>(rest), V};
  Tensor to_token = torch::stable::empty({B, n, K, W}, ScalarType::Long);
  Tensor to_log_prob = torch::stable::empty({B, n, K, W}, ScalarType::Float);
  std::vector<std::pair<float, int64_t>> order(W);
  for (int64_t b = 0; b < B; b++) {
    const float strength = pair_strength(read<double>(temperature)[b], noisy, weight, scale);
    for (int64_t place = b * n * K; place < (b + 1) * n * K; place++) {
      const int64_t at = place * W;
      const int64_t* own = read<int64_t>(token) + at;
      const float* scores = read<float>(log_prob) + at;
      // A filtered token is no parent: nothing stands behind it, whatever its rank.
      if (place % K == 0 || W == 0 || !std::isfinite(write<float>(to_log_prob)[at - W])) {
        std::copy_n(own, W, write<int64_t>(to_token) + at);
        std::copy_n(scores, W, write<float>(to_log_prob) + at);
      } else {
        rank_slot(known, write<int64_t>(to_token)[at - W], strength, W, own, scores, write<int64_t>(to_token) + at,
                  write<float>(to_log_prob) + at, order);
      }
    }
  }
  return {to_token, to_log_prob};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specblock, m) {
  m.def("follow_chain(Tensor token, Tensor log_prob, Tensor temperature, Tensor starts, Tensor tokens, Tensor gains, "
        "Tensor rest, bool noisy, float weight, float scale) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(specblock, CPU, m) { m.impl("follow_chain", TORCH_BOX(&follow_chain)); }

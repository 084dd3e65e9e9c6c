// Registers what a drafter's network does around its layers: the rows of a block from conditions and tokens, and the best
// tokens of the rows that come out. What a cycle spends beside reading weights is mostly calls; these are two of them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "layer_parts.h"
#include "ranking.h"

namespace {

using namespace specblock;

// Conditions float32 [..., F or H], tokens int64 [...] -> [..., K, H]:
// condition_part(norm(projection(x))) + token_part(norm(embedding[token])) + slots[k].
Tensor slot_inputs(const Tensor& x, std::optional<Tensor> projection, const Tensor& condition_norm,
                   const Tensor& condition_part, const Tensor& token, const Tensor& embedding, const Tensor& token_norm,
                   const Tensor& token_part, double eps, const Tensor& slots, bool coarse) {
  STD_TORCH_CHECK(x.dim() >= 1 && token.dim() == x.dim() - 1, "slot_inputs: conditions and tokens do not fit");
  check(x, ScalarType::Float, x.dim(), "conditions");
  check(token, ScalarType::Long, token.dim(), "tokens");
  check(embedding, ScalarType::Float, 2, "embedding");
  check(slots, ScalarType::Float, 2, "slots");
  const int64_t inputs = x.size(x.dim() - 1), rows = token.numel(), H = slots.size(1), K = slots.size(0);
  STD_TORCH_CHECK(x.numel() == rows * inputs && embedding.size(1) == H && (projection || inputs == H),
                  "slot_inputs: conditions, tokens and slots do not fit");
  if (projection) check_packed(*projection, inputs, H);
  check_packed(condition_part, H, H);
  check_packed(token_part, H, H);
  const float *of_condition = norm_of(condition_norm, H), *of_token = norm_of(token_norm, H);
  std::vector<float> condition(rows * H), tokens(rows * H), shared(rows * H), other(rows * H);
  for (int64_t r = 0; r < rows; r++) {
    const int64_t id = read<int64_t>(token)[r];
    STD_TORCH_CHECK(id >= 0 && id < embedding.size(0), "slot_inputs: a token is out of range");
    std::copy_n(read<float>(embedding) + id * H, H, tokens.data() + r * H);
  }
  if (projection) multiply(read<float>(x), rows, *projection, condition.data(), H, coarse);
  const float* conditions = projection ? condition.data() : read<float>(x);
  kernels().normalise(conditions, of_condition, condition.data(), rows, H, static_cast<float>(eps));
  kernels().normalise(tokens.data(), of_token, tokens.data(), rows, H, static_cast<float>(eps));
  multiply(condition.data(), rows, condition_part, shared.data(), H, coarse);
  multiply(tokens.data(), rows, token_part, other.data(), H, coarse);
  std::vector<int64_t> shape(token.sizes().begin(), token.sizes().end());
  shape.insert(shape.end(), {K, H});
  Tensor out = torch::stable::empty(shape, ScalarType::Float);
  float* to = write<float>(out);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t k = 0; k < K; k++)
      for (int64_t i = 0; i < H; i++)
        to[(r * K + k) * H + i] = (shared[r * H + i] + other[r * H + i]) + read<float>(slots)[k * H + i];
  return out;
}

// Rows float32 [N, H] -> normed [N, H], and the best tokens of the head's logits as draft_top has them. With `bias`
// [X, vocab] a row of it is added to the logits of every row of a request; bias_row int64 [requests].
std::tuple<Tensor, Tensor, Tensor, Tensor> draft_head(const Tensor& hidden, const Tensor& norm, double eps, const Tensor& head,
                                                      int64_t vocab_size, std::optional<Tensor> bias,
                                                      std::optional<Tensor> bias_row, std::optional<Tensor> noise,
                                                      std::optional<Tensor> noise_row, std::optional<Tensor> ids,
                                                      const Tensor& temperature, const Tensor& top_p, const Tensor& top_k,
                                                      const Tensor& min_p, double scale, int64_t width, int64_t num_top,
                                                      bool coarse) {
  check(hidden, ScalarType::Float, 2, "hidden");
  const int64_t N = hidden.size(0), H = hidden.size(1);
  check_packed(head, H, vocab_size);
  const float* weight = norm_of(norm, H);
  const RowRanking ranking(N, vocab_size, noise, noise_row, ids, temperature, top_p, top_k, min_p, scale, width, num_top);
  STD_TORCH_CHECK(bias.has_value() == bias_row.has_value(), "draft_head: bias and bias_row belong together");
  const int64_t requests = temperature.size(0);
  if (bias) {
    check(*bias, ScalarType::Float, 2, "bias");
    check(*bias_row, ScalarType::Long, 1, "bias_row");
    STD_TORCH_CHECK(bias->size(1) == vocab_size && bias_row->size(0) == requests, "draft_head: the bias does not fit");
    for (int64_t b = 0; b < requests; b++)
      STD_TORCH_CHECK(read<int64_t>(*bias_row)[b] >= 0 && read<int64_t>(*bias_row)[b] < bias->size(0), "bias_row is out of range");
  }
  Tensor normed = torch::stable::empty({N, H}, ScalarType::Float);
  kernels().normalise(read<float>(hidden), weight, write<float>(normed), N, H, static_cast<float>(eps));
  const auto logits = std::make_unique_for_overwrite<float[]>(N * vocab_size);
  multiply(read<float>(normed), N, head, logits.get(), vocab_size, coarse);
  if (bias)
    for (int64_t n = 0; n < N; n++) {
      const float* row = read<float>(*bias) + read<int64_t>(*bias_row)[n / (N / requests)] * vocab_size;
      for (int64_t i = 0; i < vocab_size; i++) logits[n * vocab_size + i] += row[i];
    }
  const BestTokens best = ranking(logits.get());
  return {normed, best.index, best.log_prob, best.top};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specblock, m) {
  m.def("slot_inputs(Tensor x, Tensor? projection, Tensor condition_norm, Tensor condition_part, Tensor token, "
        "Tensor embedding, Tensor token_norm, Tensor token_part, float eps, Tensor slots, bool coarse) -> Tensor");
  m.def("draft_head(Tensor hidden, Tensor norm, float eps, Tensor head, int vocab_size, Tensor? bias, Tensor? bias_row, "
        "Tensor? noise, Tensor? noise_row, Tensor? ids, Tensor temperature, Tensor top_p, Tensor top_k, Tensor min_p, "
        "float scale, int width, int num_top, bool coarse) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(specblock, CPU, m) {
  m.impl("slot_inputs", TORCH_BOX(&slot_inputs));
  m.impl("draft_head", TORCH_BOX(&draft_head));
}

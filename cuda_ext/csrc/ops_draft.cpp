// Registers what a cycle does beside its forwards: proposing, growing the tree, the target's choice.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "checks.h"
#include "draft_tree.h"
#include "ranking.h"

namespace {

using namespace specblock;

// logits float32 [N, V], sampling parameters of requests with N / requests rows each -> index int64 [N, width], log_prob
// float32 [N, width], top float32 [N, num_top].
std::tuple<Tensor, Tensor, Tensor> draft_top(const Tensor& logits, std::optional<Tensor> noise,
                                             std::optional<Tensor> noise_row, std::optional<Tensor> ids,
                                             const Tensor& temperature, const Tensor& top_p, const Tensor& top_k,
                                             const Tensor& min_p, double scale, int64_t width, int64_t num_top) {
  check(logits, ScalarType::Float, 2, "logits");
  const RowRanking ranking(logits.size(0), logits.size(1), noise, noise_row, ids, temperature, top_p, top_k, min_p, scale,
                           width, num_top);
  const BestTokens best = ranking(read<float>(logits));
  return {best.index, best.log_prob, best.top};
}

// logits float32 or float64 [N, V] -> int64 [N].
Tensor choose(const Tensor& logits, const Tensor& noise, const Tensor& noise_row, const Tensor& temperature,
              const Tensor& top_p, const Tensor& top_k, const Tensor& min_p) {
  const bool wide = logits.scalar_type() == ScalarType::Double;
  check(logits, wide ? ScalarType::Double : ScalarType::Float, 2, "logits");
  const int64_t N = logits.size(0), V = logits.size(1);
  STD_TORCH_CHECK(V > 0, "choose: the vocabulary is empty");
  check_sampling(temperature, top_p, top_k, min_p, N);
  check_noise(noise, noise_row, N, V);
  Tensor out = torch::stable::empty({N}, ScalarType::Long);
  auto* to = write<int64_t>(out);
  torch::stable::parallel_for(0, N, (1 << 14) / V + 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      const specblock::ChoiceFilters filters{read<double>(temperature)[n], read<double>(top_p)[n],
                                             read<double>(min_p)[n], read<int64_t>(top_k)[n]};
      const double* row = read<double>(noise) + read<int64_t>(noise_row)[n] * noise.size(1);
      to[n] = specblock::kernels().choose({wide ? nullptr : read<float>(logits) + n * V,
                                           wide ? read<double>(logits) + n * V : nullptr, V, filters, row});
    }
  });
  return out;
}

// token int64 [B, n, K, W], log_prob float32 alike, fan_out int64 [B, n, K], leaves [B, n] ->
// parent, depth, block, slot, rank int64, score float32, valid bool [B, n * K * W].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expand_chain(
    const Tensor& token, const Tensor& log_prob, const Tensor& fan_out, const Tensor& leaf_node, const Tensor& leaf_depth,
    const Tensor& leaf_score, const Tensor& leaf_valid, int64_t offset, int64_t block) {
  check(token, ScalarType::Long, 4, "token");
  check(log_prob, ScalarType::Float, 4, "log_prob");
  check(fan_out, ScalarType::Long, 3, "fan_out");
  const int64_t B = token.size(0), n = token.size(1), K = token.size(2), W = token.size(3), M = n * K * W;
  STD_TORCH_CHECK(log_prob.numel() == B * M && fan_out.numel() == B * n * K, "expand_chain: proposals do not fit");
  check(leaf_node, ScalarType::Long, 2, "leaf node");
  check(leaf_depth, ScalarType::Long, 2, "leaf depth");
  check(leaf_score, ScalarType::Float, 2, "leaf score");
  check(leaf_valid, ScalarType::Bool, 2, "leaf valid");
  for (const Tensor* t : {&leaf_node, &leaf_depth, &leaf_score, &leaf_valid})
    STD_TORCH_CHECK(t->size(0) == B && t->size(1) == n, "expand_chain: leaves do not fit");
  const auto longs = [&] { return torch::stable::empty({B, M}, ScalarType::Long); };
  Tensor parent = longs(), depth = longs(), blocks = longs(), slot = longs(), rank = longs();
  Tensor score = torch::stable::empty({B, M}, ScalarType::Float), valid = torch::stable::empty({B, M}, ScalarType::Bool);
  for (int64_t b = 0; b < B; b++)
    specblock::expand(
        {.token = read<int64_t>(token) + b * M, .fan_out = read<int64_t>(fan_out) + b * n * K,
         .log_prob = read<float>(log_prob) + b * M, .leaf_node = read<int64_t>(leaf_node) + b * n,
         .leaf_depth = read<int64_t>(leaf_depth) + b * n, .leaf_score = read<float>(leaf_score) + b * n,
         .leaf_valid = read<bool>(leaf_valid) + b * n, .leaves = n, .slots = K, .width = W, .offset = offset, .block = block},
        {.parent = write<int64_t>(parent) + b * M, .depth = write<int64_t>(depth) + b * M,
         .block = write<int64_t>(blocks) + b * M, .slot = write<int64_t>(slot) + b * M,
         .rank = write<int64_t>(rank) + b * M, .score = write<float>(score) + b * M, .valid = write<bool>(valid) + b * M});
  return {parent, depth, blocks, slot, rank, score, valid};
}

// Candidates [B, M] and root tokens [B] -> token, parent, depth, block, slot int64, score float32 [B, R], size int64
// [B], parent_row int64 [B, M].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> grow_tree(
    const Tensor& root_token, const Tensor& token, const Tensor& parent, const Tensor& score, const Tensor& depth,
    const Tensor& block, const Tensor& slot, const Tensor& valid, int64_t budget, bool merge) {
  check(root_token, ScalarType::Long, 1, "root_token");
  const int64_t B = root_token.size(0), M = token.dim() == 2 ? token.size(1) : 0;
  for (const Tensor* t : {&token, &parent, &depth, &block, &slot}) check(*t, ScalarType::Long, 2, "candidates");
  check(score, ScalarType::Float, 2, "score");
  check(valid, ScalarType::Bool, 2, "valid");
  for (const Tensor* t : {&token, &parent, &score, &depth, &block, &slot, &valid})
    STD_TORCH_CHECK(t->size(0) == B && t->size(1) == M, "grow_tree: candidates do not fit");
  STD_TORCH_CHECK(budget >= 0, "grow_tree: the budget must not be negative");
  const auto* parents = read<int64_t>(parent);
  for (int64_t i = 0; i < B * M; i++) STD_TORCH_CHECK(parents[i] < i % M, "grow_tree: parents must precede children");
  const int64_t keep = std::min(budget, M), R = keep + 1;
  const auto longs = [&](int64_t width) { return torch::stable::empty({B, width}, ScalarType::Long); };
  Tensor tokens = longs(R), to_parent = longs(R), to_depth = longs(R), to_block = longs(R), to_slot = longs(R);
  Tensor parent_row = longs(M), size = torch::stable::empty({B}, ScalarType::Long);
  Tensor to_score = torch::stable::empty({B, R}, ScalarType::Float);
  for (int64_t b = 0; b < B; b++)
    write<int64_t>(size)[b] = specblock::grow(
        {.token = read<int64_t>(token) + b * M, .parent = parents + b * M, .depth = read<int64_t>(depth) + b * M,
         .block = read<int64_t>(block) + b * M, .slot = read<int64_t>(slot) + b * M, .score = read<float>(score) + b * M,
         .valid = read<bool>(valid) + b * M, .size = M},
        read<int64_t>(root_token)[b], keep, merge,
        {.token = write<int64_t>(tokens) + b * R, .parent = write<int64_t>(to_parent) + b * R,
         .depth = write<int64_t>(to_depth) + b * R, .block = write<int64_t>(to_block) + b * R,
         .slot = write<int64_t>(to_slot) + b * R, .parent_row = write<int64_t>(parent_row) + b * M,
         .score = write<float>(to_score) + b * R});
  return {tokens, to_parent, to_depth, to_block, to_slot, to_score, size, parent_row};
}

// parent int64 [B, R], of row 0 itself and of others at most themselves -> bool [B, R, R], whether a row sees another.
Tensor ancestor_mask(const Tensor& parent) {
  check(parent, ScalarType::Long, 2, "parent");
  const int64_t B = parent.size(0), R = parent.size(1);
  Tensor mask = torch::stable::empty({B, R, R}, ScalarType::Bool);
  for (int64_t b = 0; b < B; b++)
    for (int64_t r = 0; r < R; r++) {
      bool* row = write<bool>(mask) + (b * R + r) * R;
      const int64_t above = read<int64_t>(parent)[b * R + r];
      STD_TORCH_CHECK(above >= 0 && above <= r, "ancestor_mask: parents must precede children");
      if (above == r) std::fill_n(row, R, false);
      else std::copy_n(write<bool>(mask) + (b * R + above) * R, R, row);
      row[r] = true;
    }
  return mask;
}

// Offers int64 [B, M] and where acceptance stopped, int64 [B] -> ranks int64 [B]; see rank_of_choice in cuda_ext/ops.py.
Tensor rank_of_choice(const Tensor& parent_row, const Tensor& token, const Tensor& rank, const Tensor& row,
                      const Tensor& said, int64_t not_offered) {
  for (const Tensor* t : {&parent_row, &token, &rank}) check(*t, ScalarType::Long, 2, "offers");
  for (const Tensor* t : {&row, &said}) check(*t, ScalarType::Long, 1, "choices");
  const int64_t B = token.size(0), M = token.size(1);
  for (const Tensor* t : {&parent_row, &rank}) STD_TORCH_CHECK(t->size(0) == B && t->size(1) == M, "rank_of_choice: offers do not fit");
  STD_TORCH_CHECK(row.size(0) == B && said.size(0) == B, "rank_of_choice: one choice per request expected");
  Tensor found = torch::stable::empty({B}, ScalarType::Long);
  for (int64_t b = 0; b < B; b++) {
    int64_t best = -1;
    for (int64_t i = b * M; i < (b + 1) * M; i++) {
      if (read<int64_t>(parent_row)[i] != read<int64_t>(row)[b]) continue;
      const int64_t own = read<int64_t>(token)[i] == read<int64_t>(said)[b] ? read<int64_t>(rank)[i] : not_offered;
      best = best < 0 ? own : std::min(best, own);
    }
    write<int64_t>(found)[b] = best;
  }
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specblock, m) {
  m.def("draft_top(Tensor logits, Tensor? noise, Tensor? noise_row, Tensor? ids, Tensor temperature, Tensor top_p, "
        "Tensor top_k, Tensor min_p, float scale, int width, int num_top) -> (Tensor, Tensor, Tensor)");
  m.def("choose(Tensor logits, Tensor noise, Tensor noise_row, Tensor temperature, Tensor top_p, Tensor top_k, "
        "Tensor min_p) -> Tensor");
  m.def("expand_chain(Tensor token, Tensor log_prob, Tensor fan_out, Tensor leaf_node, Tensor leaf_depth, "
        "Tensor leaf_score, Tensor leaf_valid, int offset, int block) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("grow_tree(Tensor root_token, Tensor token, Tensor parent, Tensor score, Tensor depth, Tensor block, "
        "Tensor slot, Tensor valid, int budget, bool merge) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("ancestor_mask(Tensor parent) -> Tensor");
  m.def("rank_of_choice(Tensor parent_row, Tensor token, Tensor rank, Tensor row, Tensor said, int not_offered) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(specblock, CPU, m) {
  m.impl("draft_top", TORCH_BOX(&draft_top));
  m.impl("choose", TORCH_BOX(&choose));
  m.impl("expand_chain", TORCH_BOX(&expand_chain));
  m.impl("grow_tree", TORCH_BOX(&grow_tree));
  m.impl("ancestor_mask", TORCH_BOX(&ancestor_mask));
  m.impl("rank_of_choice", TORCH_BOX(&rank_of_choice));
}

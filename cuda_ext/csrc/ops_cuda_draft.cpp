// Registers the CUDA side of drafting: proposing, and growing the tree. The schemas are those of the CPU operations, and
// so are the results.
#ifdef SPECBLOCK_CUDA

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "cuda_cycle.h"
#include "pair_gains.h"

namespace {

using namespace specblock;

// As on the CPU, for logits of any float type but float64.
std::tuple<Tensor, Tensor, Tensor> draft_top(const Tensor& logits, std::optional<Tensor> noise,
                                             std::optional<Tensor> noise_row, std::optional<Tensor> ids,
                                             const Tensor& temperature, const Tensor& top_p, const Tensor& top_k,
                                             const Tensor& min_p, double scale, int64_t width, int64_t num_top) {
  check_cuda_contiguous(logits, logits, logits.scalar_type(), 2, "logits");
  const int64_t N = logits.size(0), V = logits.size(1);
  const LogitType type = logit_type(logits);
  STD_TORCH_CHECK(type != LogitType::kDouble && V < (int64_t{1} << 31), "draft_top: these logits are not served");
  STD_TORCH_CHECK(width > 0 && num_top > 0 && width <= V && num_top <= V, "draft_top: more tokens wanted than there are");
  STD_TORCH_CHECK(std::max(width, num_top) <= kMostWanted, "draft_top: too many tokens wanted");
  check_cuda_sampling(temperature, top_p, top_k, min_p, logits, N);
  TopInputs inputs{.logits = logits.const_data_ptr(), .type = type, .rows = N, .vocab_size = V,
                   .temperature = read<double>(temperature), .top_p = read<double>(top_p), .min_p = read<double>(min_p),
                   .top_k = read<int64_t>(top_k), .scale = scale, .width = width, .num_top = num_top};
  if (ids) {
    check_cuda_contiguous(*ids, logits, ScalarType::Long, 1, "ids");
    STD_TORCH_CHECK(ids->size(0) == V, "ids: one per logit expected");
    inputs.ids = read<int64_t>(*ids);
  }
  STD_TORCH_CHECK(noise.has_value() == noise_row.has_value(), "draft_top: noise and noise_row belong together");
  if (noise) {
    check_cuda_contiguous(*noise, logits, ScalarType::Double, 2, "noise");
    check_cuda_contiguous(*noise_row, logits, ScalarType::Long, 1, "noise_row");
    STD_TORCH_CHECK(noise_row->size(0) == N && noise->size(0) > 0 && noise->size(1) >= (ids ? 1 : V), "noise does not fit the logits");
    inputs.noise = read<double>(*noise);
    inputs.noise_rows = noise->size(0);
    inputs.noise_size = noise->size(1);
    inputs.noise_row = read<int64_t>(*noise_row);
  }
  const CudaScope scope(logits);
  Tensor token = torch::stable::new_empty(logits, {N, width}, ScalarType::Long);
  Tensor log_prob = torch::stable::new_empty(logits, {N, width}, ScalarType::Float);
  Tensor top = torch::stable::new_empty(logits, {N, num_top}, ScalarType::Float);
  inputs.token = write<int64_t>(token);
  inputs.log_prob = write<float>(log_prob);
  inputs.top = write<float>(top);
  check_launch(specblock_cuda_draft_top(&inputs, scope.stream()), "draft_top");
  return {token, log_prob, top};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expand_chain(
    const Tensor& token, const Tensor& log_prob, const Tensor& fan_out, const Tensor& leaf_node, const Tensor& leaf_depth,
    const Tensor& leaf_score, const Tensor& leaf_valid, int64_t offset, int64_t block) {
  check_cuda_contiguous(token, token, ScalarType::Long, 4, "token");
  check_cuda_contiguous(log_prob, token, ScalarType::Float, 4, "log_prob");
  check_cuda_contiguous(fan_out, token, ScalarType::Long, 3, "fan_out");
  const int64_t B = token.size(0), n = token.size(1), K = token.size(2), W = token.size(3), M = n * K * W;
  STD_TORCH_CHECK(log_prob.numel() == B * M && fan_out.numel() == B * n * K, "expand_chain: proposals do not fit");
  check_cuda_contiguous(leaf_node, token, ScalarType::Long, 2, "leaf node");
  check_cuda_contiguous(leaf_depth, token, ScalarType::Long, 2, "leaf depth");
  check_cuda_contiguous(leaf_score, token, ScalarType::Float, 2, "leaf score");
  check_cuda_contiguous(leaf_valid, token, ScalarType::Bool, 2, "leaf valid");
  for (const Tensor* t : {&leaf_node, &leaf_depth, &leaf_score, &leaf_valid})
    STD_TORCH_CHECK(t->size(0) == B && t->size(1) == n, "expand_chain: leaves do not fit");
  const CudaScope scope(token);
  const auto longs = [&] { return torch::stable::new_empty(token, {B, M}, ScalarType::Long); };
  Tensor parent = longs(), depth = longs(), blocks = longs(), slot = longs(), rank = longs();
  Tensor score = torch::stable::new_empty(token, {B, M}, ScalarType::Float);
  Tensor valid = torch::stable::new_empty(token, {B, M}, ScalarType::Bool);
  const ExpandInputs inputs{
      .fan_out = read<int64_t>(fan_out), .leaf_node = read<int64_t>(leaf_node), .leaf_depth = read<int64_t>(leaf_depth),
      .log_prob = read<float>(log_prob), .leaf_score = read<float>(leaf_score), .leaf_valid = read<bool>(leaf_valid),
      .requests = B, .leaves = n, .slots = K, .width = W, .offset = offset, .block = block,
      .parent = write<int64_t>(parent), .depth = write<int64_t>(depth), .blocks = write<int64_t>(blocks),
      .slot = write<int64_t>(slot), .rank = write<int64_t>(rank), .score = write<float>(score), .valid = write<bool>(valid)};
  check_launch(specblock_cuda_expand_chain(&inputs, scope.stream()), "expand_chain");
  return {parent, depth, blocks, slot, rank, score, valid};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> grow_tree(
    const Tensor& root_token, const Tensor& token, const Tensor& parent, const Tensor& score, const Tensor& depth,
    const Tensor& block, const Tensor& slot, const Tensor& valid, int64_t budget, bool merge) {
  check_cuda_contiguous(root_token, root_token, ScalarType::Long, 1, "root_token");
  const int64_t B = root_token.size(0), M = token.dim() == 2 ? token.size(1) : 0;
  for (const Tensor* t : {&token, &parent, &depth, &block, &slot}) check_cuda_contiguous(*t, root_token, ScalarType::Long, 2, "candidates");
  check_cuda_contiguous(score, root_token, ScalarType::Float, 2, "score");
  check_cuda_contiguous(valid, root_token, ScalarType::Bool, 2, "valid");
  for (const Tensor* t : {&token, &parent, &score, &depth, &block, &slot, &valid})
    STD_TORCH_CHECK(t->size(0) == B && t->size(1) == M, "grow_tree: candidates do not fit");
  STD_TORCH_CHECK(budget >= 0, "grow_tree: the budget must not be negative");
  STD_TORCH_CHECK(M <= kMostCandidates, "grow_tree: too many candidates");
  const int64_t keep = std::min(budget, M), R = keep + 1;
  const CudaScope scope(root_token);
  const auto longs = [&](int64_t width) { return torch::stable::new_empty(root_token, {B, width}, ScalarType::Long); };
  Tensor tokens = longs(R), to_parent = longs(R), to_depth = longs(R), to_block = longs(R), to_slot = longs(R);
  Tensor parent_row = longs(M), size = torch::stable::new_empty(root_token, {B}, ScalarType::Long);
  Tensor to_score = torch::stable::new_empty(root_token, {B, R}, ScalarType::Float);
  const GrowInputs inputs{
      .root_token = read<int64_t>(root_token), .token = read<int64_t>(token), .parent = read<int64_t>(parent),
      .depth = read<int64_t>(depth), .block = read<int64_t>(block), .slot = read<int64_t>(slot), .score = read<float>(score),
      .valid = read<bool>(valid), .requests = B, .size = M, .keep = keep, .merge = merge, .to_token = write<int64_t>(tokens),
      .to_parent = write<int64_t>(to_parent), .to_depth = write<int64_t>(to_depth), .to_block = write<int64_t>(to_block),
      .to_slot = write<int64_t>(to_slot), .to_size = write<int64_t>(size), .parent_row = write<int64_t>(parent_row),
      .to_score = write<float>(to_score)};
  check_launch(specblock_cuda_grow_tree(&inputs, scope.stream()), "grow_tree");
  return {tokens, to_parent, to_depth, to_block, to_slot, to_score, size, parent_row};
}

std::tuple<Tensor, Tensor> follow_chain(const Tensor& token, const Tensor& log_prob, const Tensor& temperature,
                                        const Tensor& starts, const Tensor& tokens, const Tensor& gains, const Tensor& rest,
                                        bool noisy, double weight, double scale) {
  check_cuda_contiguous(token, token, ScalarType::Long, 4, "token");
  check_cuda_contiguous(log_prob, token, ScalarType::Float, 4, "log_prob");
  check_cuda_contiguous(temperature, token, ScalarType::Double, 1, "temperature");
  check_cuda_contiguous(starts, token, ScalarType::Int, 1, "starts");
  check_cuda_contiguous(tokens, token, ScalarType::Int, 1, "tokens");
  check_cuda_contiguous(gains, token, ScalarType::Float, 1, "gains");
  check_cuda_contiguous(rest, token, ScalarType::Float, 1, "rest");
  const int64_t B = token.size(0), n = token.size(1), K = token.size(2), W = token.size(3), V = rest.size(0);
  STD_TORCH_CHECK(log_prob.numel() == token.numel() && temperature.size(0) == B, "follow_chain: proposals do not fit");
  STD_TORCH_CHECK(starts.size(0) == V + 1 && gains.size(0) == tokens.size(0), "follow_chain: pairs do not fit");
  STD_TORCH_CHECK(W <= kMostFollowers, "follow_chain: too many candidates");
  const CudaScope scope(token);
  Tensor to_token = torch::stable::new_empty(token, {B, n, K, W}, ScalarType::Long);
  Tensor to_log_prob = torch::stable::new_empty(token, {B, n, K, W}, ScalarType::Float);
  const PairGains known{read<int32_t>(starts), read<int32_t>(tokens), read<float>(gains), read<float>(rest), V};
  const FollowInputs inputs{.token = read<int64_t>(token), .log_prob = read<float>(log_prob),
                            .temperature = read<double>(temperature), .requests = B, .leaves = n, .slots = K, .width = W,
                            .noisy = noisy, .weight = weight, .scale = scale, .to_token = write<int64_t>(to_token),
                            .to_log_prob = write<float>(to_log_prob)};
  check_launch(specblock_cuda_follow_chain(&inputs, &known, scope.stream()), "follow_chain");
  return {to_token, to_log_prob};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(specblock, CUDA, m) {
  m.impl("draft_top", TORCH_BOX(&draft_top));
  m.impl("expand_chain", TORCH_BOX(&expand_chain));
  m.impl("grow_tree", TORCH_BOX(&grow_tree));
  m.impl("follow_chain", TORCH_BOX(&follow_chain));
}

#endif  // SPECBLOCK_CUDA

// From a drafter's proposals to a tree: expansion of greedy chains, merging of equal paths, the best nodes, their layout.
// cuda_ext/ops.py and cuda_ext/reference.py say what each must return.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <unordered_map>
#include <vector>

#include "greedy_chain.h"

namespace specblock {

constexpr float kNever = -std::numeric_limits<float>::infinity();

// One request's raw candidates, M of each.
struct CandidateRow {
  const int64_t *token, *parent, *depth, *block, *slot;
  const float* score;
  const bool* valid;
  int64_t size;
};

// One request's proposals for n leaves of K slots and W ranks each.
struct ProposalRow {
  const int64_t *token, *fan_out;  // [n, K, W], [n, K]
  const float* log_prob;           // [n, K, W]
  const int64_t *leaf_node, *leaf_depth;
  const float* leaf_score;
  const bool* leaf_valid;
  int64_t leaves, slots, width, offset, block;
};

// Where expand() writes a request's candidates, n * K * W of each.
struct ExpandedRow {
  int64_t *parent, *depth, *block, *slot, *rank;
  float* score;
  bool* valid;
};

// Per leaf a greedy chain of K and alternatives at every slot; see drafter/expand.py.
inline void expand(const ProposalRow& from, const ExpandedRow& to) {
  int64_t at = 0;
  for (int64_t leaf = 0; leaf < from.leaves; leaf++) {
    GreedyChain chain{from.leaf_score[leaf]};
    for (int64_t slot = 0; slot < from.slots; slot++) {
      const int64_t place = leaf * from.slots + slot, first = place * from.width;
      chain.enter(from.log_prob[first]);
      const int64_t kept = std::max<int64_t>(1, from.fan_out[place]);
      const int64_t parent = slot == 0 ? from.leaf_node[leaf] : from.offset + first - from.width;
      for (int64_t rank = 0; rank < from.width; rank++, at++) {
        to.score[at] = chain.score(from.log_prob[first + rank]);
        to.parent[at] = parent;
        to.depth[at] = from.leaf_depth[leaf] + slot + 1;
        to.block[at] = from.block;
        to.slot[at] = slot;
        to.rank[at] = rank;
        to.valid[at] = from.leaf_valid[leaf] && rank < kept && chain.may_follow(to.score[at]);
      }
      chain.leave();
    }
  }
}

// One request's tree: R rows of each, and the row that every candidate was proposed behind, M of them.
struct TreeRow {
  int64_t *token, *parent, *depth, *block, *slot, *parent_row;
  float* score;
};

struct PathKey {
  int64_t parent, token;
  bool operator==(const PathKey&) const = default;
};

struct PathHash {
  size_t operator()(const PathKey& key) const {
    return static_cast<size_t>((key.parent + 1) * 0x9E3779B97F4A7C15ull ^ static_cast<uint64_t>(key.token) * 0xC2B2AE3D27D4EB4Full);
  }
};

// leader[i]: the best-scoring candidate with the same token path as i (the lower index of equals); i where nothing merges.
inline std::vector<int64_t> path_leaders(const CandidateRow& from, bool merge) {
  std::vector<int64_t> group(from.size), leader(from.size);
  std::iota(group.begin(), group.end(), 0);
  if (merge) {
    std::unordered_map<PathKey, int64_t, PathHash> known;
    known.reserve(from.size);
    for (int64_t i = 0; i < from.size; i++) {
      if (!from.valid[i]) continue;
      const int64_t above = from.parent[i] < 0 ? -1 : group[from.parent[i]];
      group[i] = known.try_emplace({above, from.token[i]}, i).first->second;
    }
  }
  std::iota(leader.begin(), leader.end(), 0);
  for (int64_t i = 0; i < from.size; i++)
    if (from.score[i] > from.score[leader[group[i]]]) leader[group[i]] = i;
  for (int64_t i = 0; i < from.size; i++)
    if (group[i] != i) leader[i] = leader[group[i]];
  return leader;
}

// Merges, keeps the best `keep` nodes, lays them out by depth. Returns the number of rows, root included.
inline int64_t grow(const CandidateRow& from, int64_t root_token, int64_t keep, bool merge, const TreeRow& to) {
  const std::vector<int64_t> leader = path_leaders(from, merge);
  std::vector<int64_t> kept;
  for (int64_t i = 0; i < from.size; i++)
    if (from.valid[i] && leader[i] == i) kept.push_back(i);
  const auto better = [&](int64_t a, int64_t b) {
    if (from.score[a] != from.score[b]) return from.score[a] > from.score[b];
    return from.depth[a] != from.depth[b] ? from.depth[a] < from.depth[b] : a < b;
  };
  const int64_t count = std::min<int64_t>(keep, kept.size());
  std::partial_sort(kept.begin(), kept.begin() + count, kept.end(), better);
  kept.resize(count);
  std::stable_sort(kept.begin(), kept.end(), [&](int64_t a, int64_t b) { return from.depth[a] < from.depth[b]; });

  std::vector<int64_t> row_of(from.size, -1);
  for (int64_t r = 0; r < count; r++) row_of[kept[r]] = r + 1;
  for (int64_t i = 0; i < from.size; i++)
    to.parent_row[i] = !from.valid[i] ? -1 : from.parent[i] < 0 ? 0 : row_of[leader[from.parent[i]]];

  to.token[0] = root_token;
  to.parent[0] = to.depth[0] = 0;
  to.block[0] = to.slot[0] = -1;
  to.score[0] = 0.0f;
  for (int64_t r = 1; r <= keep; r++) {
    const bool real = r <= count;
    const int64_t node = real ? kept[r - 1] : 0;
    to.token[r] = real ? from.token[node] : 0;
    to.parent[r] = real ? to.parent_row[node] : r;
    to.depth[r] = real ? from.depth[node] : 0;
    to.block[r] = real ? from.block[node] : -1;
    to.slot[r] = real ? from.slot[node] : -1;
    to.score[r] = real ? from.score[node] : kNever;
  }
  return count + 1;
}

}  // namespace specblock

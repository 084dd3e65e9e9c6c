// Proposals into nodes, a thread for each; it follows its chain from the leaf for itself.
#include "../greedy_chain.h"
#include "cycle.h"
#include "launch.h"

namespace specblock {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) expand_kernel(const ExpandInputs in, int64_t total) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= total) return;
  const int64_t rank = at % in.width, place = at / in.width;  // place: of the slot among all requests' slots
  const int64_t slot = place % in.slots, leaf = place / in.slots;
  const float* best = in.log_prob + (place - slot) * in.width;
  GreedyChain chain(in.leaf_score[leaf]);
  for (int64_t k = 0; k < slot; k++) {
    chain.enter(best[k * in.width]);
    chain.leave();
  }
  chain.enter(best[slot * in.width]);
  const float score = chain.score(in.log_prob[at]);
  const int64_t first = (place % (in.leaves * in.slots)) * in.width;  // within the request
  const int64_t kept = in.fan_out[place];
  in.score[at] = score;
  in.parent[at] = slot == 0 ? in.leaf_node[leaf] : in.offset + first - in.width;
  in.depth[at] = in.leaf_depth[leaf] + slot + 1;
  in.blocks[at] = in.block;
  in.slot[at] = slot;
  in.rank[at] = rank;
  in.valid[at] = in.leaf_valid[leaf] && (rank == 0 || rank < kept) && chain.may_follow(score);
}

}  // namespace
}  // namespace specblock

extern "C" const char* specblock_cuda_expand_chain(const specblock::ExpandInputs* inputs, void* stream) {
  using namespace specblock;
  const int64_t total = inputs->requests * inputs->leaves * inputs->slots * inputs->width;
  if (total == 0) return nullptr;
  expand_kernel<<<static_cast<unsigned>((total + kThreads - 1) / kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      *inputs, total);
  return launch_error();
}

// Ranks a chain's candidates by the token before them, a warp for each leaf and a lane for one or two candidates.
#include "../pair_gains.h"
#include "cycle.h"
#include "launch.h"

namespace specblock {
namespace {

constexpr int kWarps = 4, kLanes = 32;

__device__ float warp_sum(float value) {
  for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

__device__ float warp_max(float value) {
  for (int step = kLanes / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
  return value;
}

__global__ void __launch_bounds__(kWarps* kLanes) follow_kernel(const FollowInputs in, const PairGains known) {
  __shared__ float scores[kWarps][kMostFollowers];
  __shared__ int64_t best_token[kWarps];
  __shared__ float best_score[kWarps];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t leaf = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (leaf >= in.requests * in.leaves) return;  // a whole warp
  const float strength = pair_strength(in.temperature[leaf / in.leaves], in.noisy, in.weight, in.scale);
  float* score = scores[warp];
  for (int64_t slot = 0; slot < in.slots; slot++) {
    const int64_t first = (leaf * in.slots + slot) * in.width;
    // A filtered token is no parent: nothing stands behind it, whatever its rank.
    bool ranked = slot > 0 && isfinite(best_score[warp]);
    const int64_t before = ranked ? best_token[warp] : -1;
    __syncwarp();
    float inside = 0, most = -INFINITY, total = 0;
    for (int64_t w = lane; w < in.width; w += kLanes) {
      const float own = in.log_prob[first + w];
      score[w] = ranked ? own + strength * pair_gain(known, before, in.token[first + w]) : own;
      inside += expf(own);
      most = fmaxf(most, score[w]);
    }
    // At low temperatures scores are far from 0 on either side.
    const float outside = log_outside(warp_sum(inside));
    most = fmaxf(warp_max(most), outside);
    for (int64_t w = lane; w < in.width; w += kLanes) total += expf(score[w] - most);
    float normaliser = most + logf(warp_sum(total) + expf(outside - most));
    if (!ranked || !isfinite(normaliser)) {  // a score is no number: left as it is
      for (int64_t w = lane; w < in.width; w += kLanes) score[w] = in.log_prob[first + w];
      ranked = false;
      normaliser = 0.0f;
    }
    __syncwarp();
    for (int64_t w = lane; w < in.width; w += kLanes) {
      int64_t place = ranked ? 0 : w;
      for (int64_t v = 0; ranked && v < in.width; v++) place += score[v] > score[w] || (score[v] == score[w] && v < w);
      in.to_token[first + place] = in.token[first + w];
      in.to_log_prob[first + place] = score[w] - normaliser;
      if (place == 0) {
        best_token[warp] = in.token[first + w];
        best_score[warp] = score[w] - normaliser;
      }
    }
    __syncwarp();
  }
}

}  // namespace
}  // namespace specblock

extern "C" const char* specblock_cuda_follow_chain(const specblock::FollowInputs* inputs, const specblock::PairGains* known,
                                                   void* stream) {
  using namespace specblock;
  const int64_t leaves = inputs->requests * inputs->leaves;
  if (leaves == 0 || inputs->slots == 0 || inputs->width == 0) return nullptr;
  const auto blocks = static_cast<unsigned>((leaves + kWarps - 1) / kWarps);
  follow_kernel<<<blocks, kWarps * kLanes, 0, static_cast<cudaStream_t>(stream)>>>(*inputs, *known);
  return launch_error();
}

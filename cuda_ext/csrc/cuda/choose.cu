// The target's choice of single rows, and the walk through whole trees by those choices without the host.
#include "choose.cuh"

#include "cycle.h"

namespace specblock {
namespace {

constexpr int kThreads = 512;

__device__ __forceinline__ ChoiceFilters filters_of(const ChoiceInputs& inputs, int64_t row) {
  return {inputs.temperature[row], inputs.top_p[row], inputs.min_p[row], inputs.top_k[row]};
}

__device__ __forceinline__ const double* noise_of(const ChoiceInputs& inputs, int64_t at) {
  return inputs.noise + min(max(inputs.noise_row[at], int64_t{0}), inputs.noise_rows - 1) * inputs.noise_size;
}

template <class Logit>
__device__ __forceinline__ int chosen(Team& team, const ChoiceInputs& inputs, int64_t row, int64_t law, int64_t noise_at) {
  return TeamChoice<Logit>(team, static_cast<const Logit*>(inputs.logits) + row * inputs.vocab_size,
                           static_cast<int>(inputs.vocab_size), filters_of(inputs, law), noise_of(inputs, noise_at))
      .find();
}

template <class Logit>
__global__ void __launch_bounds__(kThreads) choose_kernel(const ChoiceInputs inputs, int64_t* __restrict__ out) {
  Team team(*reinterpret_cast<TeamShared*>(shared_bytes));
  const int64_t row = blockIdx.x / team_blocks();
  const int said = chosen<Logit>(team, inputs, row, row, row);
  if (team.first() == 0) out[row] = said;
  team.leave();
}

// The first child of `row` with this token, or `rows`: every block finds it for itself.
__device__ int child_of(const int64_t* token, const int64_t* parent, int row, int rows, int64_t said, int* found) {
  __syncthreads();
  if (threadIdx.x == 0) *found = rows;
  __syncthreads();
  for (int child = row + 1 + threadIdx.x; child < rows; child += blockDim.x)
    if (parent[child] == row && token[child] == said) atomicMin(found, child);
  __syncthreads();
  return *found;
}

template <class Logit>
__global__ void __launch_bounds__(kThreads) accept_walk_kernel(const ChoiceInputs inputs, const WalkInputs walk) {
  __shared__ int found;
  Team team(*reinterpret_cast<TeamShared*>(shared_bytes));
  const int64_t request = blockIdx.x / team_blocks();
  const int64_t *token = walk.token + request * walk.rows, *parent = walk.parent + request * walk.rows;
  int64_t *tokens = walk.tokens + request * walk.levels, *path = walk.path + request * walk.levels;
  const bool writes = team.first() == 0;
  const int rows = static_cast<int>(walk.rows);
  int row = 0;
  int64_t level = 0;
  while (level < walk.levels) {
    const int said = chosen<Logit>(team, inputs, request * walk.rows + row, request, request * walk.levels + level);
    if (writes) {
      tokens[level] = said;
      path[level] = row;
    }
    level++;
    const int child = child_of(token, parent, row, rows, said, &found);
    if (child == rows) break;
    row = child;
  }
  if (writes) {
    walk.count[request] = level;
    for (int64_t i = level; i < walk.levels; i++) {
      tokens[i] = -1;
      path[i] = i;
    }
  }
  team.leave();
}

template <class Logit>
const char* choose(const ChoiceInputs& inputs, int64_t rows, int64_t* out, void* stream) {
  return launch_teams<choose_kernel<Logit>>({rows, inputs.vocab_size, kThreads, sizeof(TeamShared), stream}, inputs, out);
}

template <class Logit>
const char* accept_walk(const ChoiceInputs& inputs, const WalkInputs& walk, void* stream) {
  return launch_teams<accept_walk_kernel<Logit>>({walk.requests, inputs.vocab_size, kThreads, sizeof(TeamShared), stream}, inputs, walk);
}

}  // namespace
}  // namespace specblock

extern "C" const char* specblock_cuda_choose(const specblock::ChoiceInputs* inputs, int64_t rows, int64_t* out, void* stream) {
  using namespace specblock;
  if (rows == 0) return nullptr;
  switch (inputs->type) {
    case LogitType::kFloat: return choose<float>(*inputs, rows, out, stream);
    case LogitType::kDouble: return choose<double>(*inputs, rows, out, stream);
    case LogitType::kBfloat16: return choose<__nv_bfloat16>(*inputs, rows, out, stream);
    default: return choose<__half>(*inputs, rows, out, stream);
  }
}

extern "C" const char* specblock_cuda_accept_walk(const specblock::ChoiceInputs* inputs, const specblock::WalkInputs* walk,
                                                  void* stream) {
  using namespace specblock;
  if (walk->requests == 0) return nullptr;
  switch (inputs->type) {
    case LogitType::kFloat: return accept_walk<float>(*inputs, *walk, stream);
    case LogitType::kDouble: return accept_walk<double>(*inputs, *walk, stream);
    case LogitType::kBfloat16: return accept_walk<__nv_bfloat16>(*inputs, *walk, stream);
    default: return accept_walk<__half>(*inputs, *walk, stream);
  }
}

// From a drafter's candidates to a tree: merging of equal paths, the best nodes, their layout. One block per request.
//
// Equal paths are found through 64-bit hashes of whole paths in a table of candidates. Every merge is then checked: same
// token, and parents that are merged themselves. A collision would fail that check, and other hashes are taken.
#include "cycle.h"
#include "keys.cuh"
#include "launch.h"

namespace specblock {
namespace {

constexpr int kWarp = 32;
constexpr int kTries = 8;  // sets of hashes; a collision that outlasts them costs a proposal, never the text
constexpr unsigned long long kNothing = ~0ull;

extern __shared__ __align__(16) char grow_bytes[];

__device__ __forceinline__ unsigned long long mixed(unsigned long long x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// Both zeros are equal.
__device__ __forceinline__ uint32_t ordered(float score) { return ordered_key(score == 0 ? 0.0f : score); }

// What a block keeps in shared memory; P is the power of two from the number of candidates up.
struct Room {
  unsigned long long *hash, *best;  // [P]; later the keys of the two sorts
  int *table, *group, *leader, *above, *row_of;  // [2 P], [P] each

  __host__ __device__ static int64_t bytes(int64_t padded) { return padded * (2 * 8 + 2 * 4 + 4 * 4); }

  __device__ Room(char* base, int padded) {
    hash = reinterpret_cast<unsigned long long*>(base);
    best = hash + padded;
    table = reinterpret_cast<int*>(best + padded);
    group = table + 2 * padded;
    leader = group + padded;
    above = leader + padded;
    row_of = above + padded;
  }
};

// Ascending, n a power of two. Steps of at most a warp stay within the 64 keys that each warp holds in them.
__device__ void sort(unsigned long long* keys, int n) {
  for (int size = 2; size <= n; size *= 2)
    for (int step = size / 2; step > 0; step /= 2) {
      for (int t = threadIdx.x; t < n / 2; t += blockDim.x) {
        const int low = 2 * t - (t & (step - 1)), high = low + step;
        const unsigned long long a = keys[low], b = keys[high];
        if ((a > b) == ((low & size) == 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      if (step > kWarp || (step == 1 && size > kWarp)) __syncthreads();
      else __syncwarp();
    }
  __syncthreads();
}

// The hash of the path from the root down to i. A candidate that is no node is nobody's equal: its children say so.
__device__ unsigned long long path_hash(const Room& room, const int64_t* token, const bool* valid, int i, int attempt) {
  unsigned long long hash = 0, power = 1;
  const unsigned long long seed = 0x9E3779B97F4A7C15ull * (2 * attempt + 1);
  for (int at = i; at >= 0; at = room.above[at]) {
    const bool node = valid[at];
    hash += power * mixed(seed + static_cast<unsigned long long>(node ? token[at] : ~static_cast<int64_t>(at) - (int64_t{1} << 40)));
    power *= 0xD1342543DE82EF95ull;
    if (!node) return hash;
  }
  return hash + power * seed;
}

// group[i]: one candidate for all with the same path as i, itself where nothing merges. False if hashes collided.
__device__ bool group_paths(const Room& room, const int64_t* token, const bool* valid, int size, int padded, int attempt, int* wrong) {
  __syncthreads();  // `wrong` of the attempt before has been read
  for (int i = threadIdx.x; i < size; i += blockDim.x) room.hash[i] = path_hash(room, token, valid, i, attempt);
  for (int i = threadIdx.x; i < 2 * padded; i += blockDim.x) room.table[i] = -1;
  if (threadIdx.x == 0) *wrong = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    int held = i;
    if (valid[i]) {
      int place = static_cast<int>(room.hash[i] >> 32) & (2 * padded - 1);
      for (;;) {
        held = atomicCAS(&room.table[place], -1, i);
        if (held < 0) held = i;
        if (held == i || room.hash[held] == room.hash[i]) break;
        place = (place + 1) & (2 * padded - 1);
      }
    }
    room.group[i] = held;
  }
  __syncthreads();
  const auto group_above = [&](int i) { return room.above[i] < 0 ? -1 : room.group[room.above[i]]; };
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    const int held = room.group[i];
    if (token[held] != token[i] || group_above(held) != group_above(i)) *wrong = 1;
  }
  __syncthreads();
  return *wrong == 0;
}

// leader[i]: the best-scoring candidate with the path of i, the lower index of equals.
__device__ void find_leaders(const Room& room, const float* score, const bool* valid, int size) {
  for (int i = threadIdx.x; i < size; i += blockDim.x) room.best[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < size; i += blockDim.x)
    if (valid[i])
      atomicMax(&room.best[room.group[i]], static_cast<unsigned long long>(ordered(score[i])) << 32 | ~static_cast<uint32_t>(i));
  __syncthreads();
  for (int i = threadIdx.x; i < size; i += blockDim.x)
    room.leader[i] = valid[i] ? static_cast<int>(~static_cast<uint32_t>(room.best[room.group[i]])) : i;
  __syncthreads();
}

__global__ void __launch_bounds__(1024) grow_kernel(const GrowInputs in, int padded) {
  __shared__ int wrong;
  __shared__ int survivors;
  const Room room(grow_bytes, padded);
  const int size = static_cast<int>(in.size), keep = static_cast<int>(in.keep);
  const int64_t base = blockIdx.x * in.size, row_base = blockIdx.x * (in.keep + 1);
  const int64_t *token = in.token + base, *parent = in.parent + base, *depth = in.depth + base;
  const float* score = in.score + base;
  const bool* valid = in.valid + base;

  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    const int64_t up = parent[i];
    room.above[i] = up < 0 || up >= i ? -1 : static_cast<int>(up);
    room.leader[i] = i;
    room.row_of[i] = -1;
  }
  if (threadIdx.x == 0) survivors = 0;
  __syncthreads();
  if (in.merge) {
    for (int attempt = 0; attempt < kTries; attempt++)
      if (group_paths(room, token, valid, size, padded, attempt, &wrong)) break;
    find_leaders(room, score, valid, size);
  }

  // Best first: score, then depth, then index.
  unsigned long long* keys = room.hash;
  const auto shallow = [&](int i) { return static_cast<unsigned long long>(min(max(depth[i], int64_t{0}), int64_t{0xFFFF})); };
  for (int i = threadIdx.x; i < padded; i += blockDim.x) {
    const bool survives = i < size && valid[i] && room.leader[i] == i;
    if (survives) atomicAdd(&survivors, 1);
    keys[i] = survives ? static_cast<unsigned long long>(~ordered(score[i])) << 32 | shallow(i) << 16 | i : kNothing;
  }
  __syncthreads();
  sort(keys, padded);

  // By depth, the best first within one.
  const int count = min(keep, survivors);
  int laid = 1;
  while (laid < count) laid *= 2;
  unsigned long long* order = room.best;
  for (int r = threadIdx.x; r < laid; r += blockDim.x) {
    const unsigned long long key = r < count ? keys[r] : kNothing;
    order[r] = r < count ? (key >> 16 & 0xFFFF) << 32 | static_cast<unsigned long long>(r) << 16 | (key & 0xFFFF) : kNothing;
  }
  __syncthreads();
  sort(order, laid);
  for (int r = threadIdx.x; r < count; r += blockDim.x) room.row_of[order[r] & 0xFFFF] = r + 1;
  __syncthreads();

  const auto row_above = [&](int i) { return room.above[i] < 0 ? 0 : room.row_of[room.leader[room.above[i]]]; };
  for (int i = threadIdx.x; i < size; i += blockDim.x) in.parent_row[base + i] = valid[i] ? row_above(i) : -1;
  for (int r = threadIdx.x; r <= keep; r += blockDim.x) {
    const int64_t to = row_base + r;
    const bool real = r > 0 && r <= count;
    const int node = real ? static_cast<int>(order[r - 1] & 0xFFFF) : 0;
    in.to_token[to] = real ? token[node] : r == 0 ? in.root_token[blockIdx.x] : 0;
    in.to_parent[to] = real ? row_above(node) : r;
    in.to_depth[to] = real ? depth[node] : 0;
    in.to_block[to] = real ? in.block[base + node] : -1;
    in.to_slot[to] = real ? in.slot[base + node] : -1;
    in.to_score[to] = real ? score[node] : r == 0 ? 0.0f : -INFINITY;
  }
  if (threadIdx.x == 0) in.to_size[blockIdx.x] = count + 1;
}

}  // namespace
}  // namespace specblock

extern "C" const char* specblock_cuda_grow_tree(const specblock::GrowInputs* inputs, void* stream) {
  using namespace specblock;
  if (inputs->requests == 0) return nullptr;
  if (inputs->size > kMostCandidates) return "too many candidates";
  int padded = kWarp;
  while (padded < inputs->size) padded *= 2;
  const auto bytes = static_cast<int>(Room::bytes(padded));
  const cudaError_t status = cudaFuncSetAttribute(grow_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(status);
  }
  const int threads = padded / 2 < 128 ? 128 : padded / 2 > 1024 ? 1024 : padded / 2;
  grow_kernel<<<static_cast<unsigned>(inputs->requests), threads, bytes, static_cast<cudaStream_t>(stream)>>>(*inputs, padded);
  return launch_error();
}

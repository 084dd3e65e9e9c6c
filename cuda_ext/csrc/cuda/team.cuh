// A team of threads that works on one row: one block, or on Hopper a cluster of blocks that read each other's shared
// memory. Everything here is called by all threads of the team together.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"

namespace specblock {

constexpr int kWarp = 32;
constexpr int kMostBlocks = 16;  // of a team

extern __shared__ __align__(16) char shared_bytes[];

__device__ __forceinline__ int team_blocks() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
#else
  return 1;
#endif
}

__device__ __forceinline__ int team_block() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(cooperative_groups::this_cluster().block_rank());
#else
  return 0;
#endif
}

// Also makes what was written before it, in shared memory too, visible to the team.
__device__ __forceinline__ void team_barrier() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}

// The same place in the shared memory of another block of the team.
template <class T>
__device__ __forceinline__ const T* of_block(T* mine, int block) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(mine, block);
#else
  return mine;
#endif
}

template <class T>
__device__ __forceinline__ T lane_below(T value, int offset) {
  static_assert(sizeof(T) % 4 == 0);
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_down_sync(0xFFFFFFFFu, word, offset);
  memcpy(&value, words, sizeof(T));
  return value;
}

// Room for reductions of values of at most 48 bytes; two of what other blocks read, because they may be a step behind.
struct TeamShared {
  double warp[kWarp][6], block[2][6], team[2][6];
  uint32_t histogram[2][256], summed[256];
  uint64_t digit[3];  // the digit, what is left of the rank, whether that is all that the digit's bin holds
};

// One per thread; the blocks' shared memory is in `room`.
class Team {
 public:
  __device__ explicit Team(TeamShared& room) : room_(room) {}

  __device__ int64_t first() const { return static_cast<int64_t>(team_block()) * blockDim.x + threadIdx.x; }
  __device__ int64_t stride() const { return static_cast<int64_t>(team_blocks()) * blockDim.x; }

  // The merged values of all threads, in an order that depends on the shape of the team alone.
  template <class T, class Merge>
  __device__ T reduce(T value, const T& neutral, Merge merge) {
    static_assert(sizeof(T) <= sizeof(room_.block[0]));
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, turn = turn_;
    turn_ ^= 1;
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value = merge(value, lane_below(value, offset));
    if (lane == 0) memcpy(room_.warp[warp], &value, sizeof(T));
    __syncthreads();
    if (warp == 0) {
      value = neutral;
      if (lane < blockDim.x / kWarp) memcpy(&value, room_.warp[lane], sizeof(T));
      for (int offset = kWarp / 2; offset > 0; offset /= 2) value = merge(value, lane_below(value, offset));
      if (lane == 0) memcpy(room_.block[turn], &value, sizeof(T));
    }
    team_barrier();
    if (warp == 0) {
      value = neutral;
      if (lane < team_blocks()) memcpy(&value, of_block(room_.block[turn], lane), sizeof(T));
      for (int offset = kMostBlocks / 2; offset > 0; offset /= 2) value = merge(value, lane_below(value, offset));
      if (lane == 0) memcpy(room_.team[turn], &value, sizeof(T));
    }
    __syncthreads();
    memcpy(&value, room_.team[turn], sizeof(T));
    return value;
  }

  // Of the keys that `key_of(i)` gives for i < size, by 8 bits at a time: the `rank`-th largest (1-based), or, if it need
  // not be exact, a key that exactly `rank` of them reach, where they differ from each other.
  template <class Key, bool kExact, class KeyOf>
  __device__ Key largest_key(int64_t size, int64_t rank, KeyOf key_of) {
    Key prefix = 0;
    for (int shift = 8 * static_cast<int>(sizeof(Key)) - 8; shift >= 0; shift -= 8) {
      const int turn = turn_;
      turn_ ^= 1;
      uint32_t* histogram = room_.histogram[turn];
      for (int bin = threadIdx.x; bin < 256; bin += blockDim.x) histogram[bin] = 0;
      __syncthreads();
      const bool top = shift == 8 * static_cast<int>(sizeof(Key)) - 8;
      for (int64_t i = first(); i < size; i += stride()) {
        const Key key = key_of(i);
        if (top || (key ^ prefix) >> (top ? 0 : shift + 8) == 0) atomicAdd(&histogram[(key >> shift) & 255], 1u);
      }
      team_barrier();
      for (int bin = threadIdx.x; bin < 256; bin += blockDim.x) {
        uint32_t sum = 0;
        for (int block = 0; block < team_blocks(); block++) sum += of_block(histogram, block)[bin];
        room_.summed[bin] = sum;
      }
      __syncthreads();
      if (threadIdx.x < kWarp) find_digit(rank);
      __syncthreads();
      prefix |= static_cast<Key>(room_.digit[0]) << shift;
      rank = static_cast<int64_t>(room_.digit[1]);
      if (!kExact && room_.digit[2] != 0) break;
    }
    return prefix;
  }

  // Before any block leaves: others may still be reading its shared memory.
  __device__ void leave() const { team_barrier(); }

 private:
  // The bin, from the largest down, in which the `rank`-th value lies, and its rank within; by one warp.
  __device__ void find_digit(int64_t rank) {
    const int lane = threadIdx.x, last = 255 - 8 * lane;
    int64_t own = 0;
    for (int k = 0; k < 8; k++) own += room_.summed[last - k];
    int64_t before = own;
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int64_t other = __shfl_up_sync(0xFFFFFFFFu, before, offset);
      if (lane >= offset) before += other;
    }
    before -= own;
    if (rank <= before || rank > before + own) return;
    int64_t left = rank - before;
    int bin = last;
    for (; left > room_.summed[bin]; bin--) left -= room_.summed[bin];
    room_.digit[0] = static_cast<uint64_t>(bin);
    room_.digit[1] = static_cast<uint64_t>(left);
    room_.digit[2] = left == room_.summed[bin];
  }

  TeamShared& room_;
  int turn_ = 0;
};

// How many blocks a team may have on the current device; the same for every row, so that sums do not depend on the batch.
template <class Kernel>
int most_team_blocks(Kernel kernel, int threads, int shared) {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess || major < 9) return 1;
  constexpr int kPortable = 8;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {kMostBlocks, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(kMostBlocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0) return kMostBlocks;
  }
  cudaGetLastError();  // a refusal is an answer
  return kPortable;
}

struct TeamLaunch {
  int64_t rows, size;  // teams, and entries of a row
  int threads, shared;  // of a block
  void* stream;
};

// One team per row.
template <auto kKernel, class... Given>
const char* launch_teams(const TeamLaunch& launch, const Given&... given) {
  constexpr int64_t kPerBlock = 4096;  // entries that are worth a block
  static thread_local int known_device = -1, known_blocks = 1;
  int device = 0;
  cudaGetDevice(&device);
  if (device != known_device) {
    known_blocks = most_team_blocks(kKernel, launch.threads, launch.shared);
    known_device = device;
  }
  int blocks = 1;
  while (blocks < known_blocks && blocks * kPerBlock < launch.size) blocks *= 2;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(launch.rows * blocks));
  config.blockDim = dim3(static_cast<unsigned>(launch.threads));
  config.dynamicSmemBytes = launch.shared;
  config.stream = static_cast<cudaStream_t>(launch.stream);
  config.attrs = &attribute;
  config.numAttrs = blocks > 1 ? 1 : 0;
  const cudaError_t status = cudaLaunchKernelEx(&config, kKernel, given...);
  if (status != cudaSuccess) cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace specblock

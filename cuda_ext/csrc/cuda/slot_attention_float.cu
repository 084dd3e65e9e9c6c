// Slot attention in float32, on ordinary units: exact to float32 rounding, for models that are served in it and for tests.
//
// A block takes 16 query rows, eight neighbouring threads one row: each thread scores four keys of a tile and mixes an
// eighth of the row's dimensions.
#include "launch.h"
#include "slot_attention.cuh"

namespace specblock {
namespace {

constexpr int kRows = 16, kPerRow = 8, kThreads = kRows * kPerRow;
constexpr int kTile = 32, kScores = kTile / kPerRow;

template <int D>
struct FloatTiles {
  // Rows are one vector longer than the head, so that eight rows lie in different banks.
  float query[kRows][D + 4], keys[2][kTile][D + 4], values[2][kTile][D + 4];
  float weights[kRows][kTile + 1];
};

template <int D>
__device__ inline float product(const float* x, const float* y) {
  float sum = 0.0f;
#pragma unroll 8
  for (int d = 0; d < D; d += 4) {
    const float4 p = *reinterpret_cast<const float4*>(x + d), q = *reinterpret_cast<const float4*>(y + d);
    sum = __fmaf_rn(p.x, q.x, sum);
    sum = __fmaf_rn(p.y, q.y, sum);
    sum = __fmaf_rn(p.z, q.z, sum);
    sum = __fmaf_rn(p.w, q.w, sum);
  }
  return sum;
}

template <int D>
__global__ void __launch_bounds__(kThreads, 1) attend_float(const SlotAttention a) {
  constexpr int kVectors = D / 4, kPerPass = kThreads / kVectors, kMixed = D / kPerRow / 4;
  static_assert(kTile % kPerPass == 0);
  extern __shared__ __align__(16) unsigned char memory[];
  FloatTiles<D>& tiles = *reinterpret_cast<FloatTiles<D>*>(memory);

  const SlotPart part(a);
  const int first_row = blockIdx.x * kRows;
  if (part.begin >= part.end) {
    part.leave_empty(a, first_row, kRows);
    return;
  }
  const int vector = threadIdx.x % kVectors, pass = threadIdx.x / kVectors;
  const float* const key = static_cast<const float*>(a.key) + part.slot(a) * a.key_slot + part.group(a) * a.key_head + vector * 4;
  const float* const value =
      static_cast<const float*>(a.value) + part.slot(a) * a.value_slot + part.group(a) * a.value_head + vector * 4;
  const auto fetch = [&](int tile) {
    const int first = part.begin + tile * kTile;
#pragma unroll 4
    for (int row = pass; row < kTile; row += kPerPass) {
      const bool wanted = first + row < part.all;  // the rest is zeros: it may be anything, and zero times NaN is NaN
      const int64_t at = wanted ? first + row : 0;
      copy_16(shared_address(&tiles.keys[tile % 2][row][vector * 4]), key + at * a.key_row, wanted);
      copy_16(shared_address(&tiles.values[tile % 2][row][vector * 4]), value + at * a.value_row, wanted);
    }
  };
  const int num_tiles = (part.end - part.begin + kTile - 1) / kTile;
  fetch(0);
  end_of_copies();
  if (num_tiles > 1) fetch(1);
  end_of_copies();
  for (int i = threadIdx.x; i < kRows * D; i += kThreads) {
    const int m = first_row + i / D;
    tiles.query[i / D][i % D] =
        m < part.rows(a) ? static_cast<const float*>(a.query)[part.query_offset(a, m) + i % D] : 0.0f;
  }

  const int row = threadIdx.x / kPerRow, lane = threadIdx.x % kPerRow, m = first_row + row;
  const bool* const visible = part.visible(a, m);
  float4 mixture[kMixed] = {};
  float top = -INFINITY, sum = 0.0f;
  for (int tile = 0; tile < num_tiles; tile++) {
    wait_for_copies<1>();
    __syncthreads();
    const auto& keys = tiles.keys[tile % 2];
    const auto& values = tiles.values[tile % 2];
    const int first = part.begin + tile * kTile;
    float scores[kScores];
    float most = top;
#pragma unroll
    for (int j = 0; j < kScores; j++) {
      const int t = lane + j * kPerRow;
      scores[j] = product<D>(tiles.query[row], keys[t]);
      if (part.hidden(a, visible, first + t)) scores[j] = -INFINITY;
      most = fmaxf(most, scores[j]);
    }
#pragma unroll
    for (int apart = 1; apart < kPerRow; apart *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, apart));
    // A row that has seen nothing yet has no maximum: weights 2^(-inf - 0), not 2^(-inf + inf).
    const float base = most == -INFINITY ? 0.0f : most;
    const float shrink = exp2f(__fmul_rn(__fsub_rn(top, base), a.scale_log2));
    sum = __fmul_rn(sum, shrink);
#pragma unroll
    for (int j = 0; j < kScores; j++) {
      const float weight = exp2f(__fmul_rn(__fsub_rn(scores[j], base), a.scale_log2));
      tiles.weights[row][lane + j * kPerRow] = weight;
      sum = __fadd_rn(sum, weight);  // of this thread's keys
    }
    top = most;
    __syncwarp();  // the eight threads of a row are of one warp
#pragma unroll
    for (int j = 0; j < kMixed; j++) {
      float4& x = mixture[j];
      x = make_float4(__fmul_rn(x.x, shrink), __fmul_rn(x.y, shrink), __fmul_rn(x.z, shrink), __fmul_rn(x.w, shrink));
    }
#pragma unroll 4
    for (int t = 0; t < kTile; t++) {
      const float weight = tiles.weights[row][t];
#pragma unroll
      for (int j = 0; j < kMixed; j++) {
        const float4 v = *reinterpret_cast<const float4*>(&values[t][(lane + j * kPerRow) * 4]);
        float4& x = mixture[j];
        x = make_float4(__fmaf_rn(weight, v.x, x.x), __fmaf_rn(weight, v.y, x.y), __fmaf_rn(weight, v.z, x.z),
                        __fmaf_rn(weight, v.w, x.w));
      }
    }
    __syncthreads();
    if (tile + 2 < num_tiles) fetch(tile + 2);
    end_of_copies();  // empty at the end, so that the count of pending groups stays right
  }

#pragma unroll
  for (int apart = 1; apart < kPerRow; apart *= 2) sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, apart));
  if (m >= part.rows(a)) return;
  if (lane == 0) reinterpret_cast<float2*>(a.peak)[part.partial(a, m)] = make_float2(top, sum);
  float* const to = a.mixture + part.partial(a, m) * D;
#pragma unroll
  for (int j = 0; j < kMixed; j++) *reinterpret_cast<float4*>(to + (lane + j * kPerRow) * 4) = mixture[j];
}

template <int D>
const char* launch(const SlotAttention& a, void* stream) {
  constexpr int kBytes = sizeof(FloatTiles<D>);
  const int rows = a.R * (a.H / a.G);
  const dim3 grid((rows + kRows - 1) / kRows, a.splits, a.B * a.G);
  auto* const kernel = attend_float<D>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes) != cudaSuccess) return launch_error();
  kernel<<<grid, kThreads, kBytes, static_cast<cudaStream_t>(stream)>>>(a);
  return launch_error();
}

}  // namespace

const char* launch_slot_tiles_float(const SlotAttention& a, void* stream) {
  return a.D == 64 ? launch<64>(a, stream) : launch<128>(a, stream);
}

}  // namespace specblock

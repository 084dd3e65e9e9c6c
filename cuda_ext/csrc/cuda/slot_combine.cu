// Joins what the splits of slot attention left: one warp per row of one head.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"
#include "slot_attention.cuh"

namespace specblock {
namespace {

constexpr int kWarps = 4;
static_assert(kMaxSplits <= 32, "a lane keeps the peak of one split");

__device__ inline void convert(float from, float* to) { *to = from; }
__device__ inline void convert(float from, __half* to) { *to = __float2half_rn(from); }
__device__ inline void convert(float from, __nv_bfloat16* to) { *to = __float2bfloat16_rn(from); }

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T x[N];
};

// to += w * from; what has no weight is not read, and need never have been written.
__device__ inline void add(float w, const float* from, float (&to)[2]) {
  const float2 x = w == 0.0f ? make_float2(0.0f, 0.0f) : *reinterpret_cast<const float2*>(from);
  to[0] = __fmaf_rn(w, x.x, to[0]);
  to[1] = __fmaf_rn(w, x.y, to[1]);
}

__device__ inline void add(float w, const float* from, float (&to)[4]) {
  const float4 x = w == 0.0f ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : *reinterpret_cast<const float4*>(from);
  to[0] = __fmaf_rn(w, x.x, to[0]);
  to[1] = __fmaf_rn(w, x.y, to[1]);
  to[2] = __fmaf_rn(w, x.z, to[2]);
  to[3] = __fmaf_rn(w, x.w, to[3]);
}

template <class T, int D>
__global__ void __launch_bounds__(kWarps * 32, 1) combine(const SlotAttention a) {
  constexpr int N = D / 32;
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.x * kWarps + threadIdx.x / 32;
  if (row >= a.B * a.R * a.H) return;
  const int head = row % a.H, heads = a.H / a.G, m = row / a.H % a.R * heads + head % heads;
  const int64_t request = row / a.H / a.R, rows = a.R * heads;
  const int64_t first = (request * a.G + head / heads) * a.splits * rows + m;  // of split 0; the next are `rows` apart

  float2 peak = make_float2(-INFINITY, 0.0f);
  if (lane < a.splits) peak = reinterpret_cast<const float2*>(a.peak)[first + lane * rows];
  float top = peak.x;
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, apart));
  // Nothing was written for an empty split. Where all are empty the result is 0 / 0.
  const float weight = peak.x == -INFINITY ? 0.0f : exp2f(__fmul_rn(__fsub_rn(peak.x, top), a.scale_log2));
  float total = 0.0f, mixed[N] = {};
#pragma unroll 4
  for (int s = 0; s < a.splits; s++) {
    const float w = __shfl_sync(0xffffffffu, weight, s);
    total = __fmaf_rn(w, __shfl_sync(0xffffffffu, peak.y, s), total);
    add(w, a.mixture + (first + s * rows) * D + lane * N, mixed);
  }
  Vector<T, N> result;
#pragma unroll
  for (int i = 0; i < N; i++) convert(__fdiv_rn(mixed[i], total), &result.x[i]);
  *reinterpret_cast<Vector<T, N>*>(static_cast<T*>(a.out) + static_cast<int64_t>(row) * D + lane * N) = result;
}

template <class T>
const char* launch(const SlotAttention& a, void* stream) {
  const int64_t blocks = (static_cast<int64_t>(a.B) * a.R * a.H + kWarps - 1) / kWarps;
  auto* const kernel = a.D == 64 ? combine<T, 64> : combine<T, 128>;
  kernel<<<static_cast<unsigned>(blocks), kWarps * 32, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return launch_error();
}

}  // namespace

const char* launch_slot_combine(const SlotAttention& a, void* stream) {
  if (a.type == SlotType::kFloat) return launch<float>(a, stream);
  return a.type == SlotType::kHalf ? launch<__half>(a, stream) : launch<__nv_bfloat16>(a, stream);
}

}  // namespace specblock

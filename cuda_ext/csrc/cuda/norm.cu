// Root-mean-square norms, alone or behind the addition of a residual. A block is a row: it reads it once and keeps it in
// registers. The order of additions depends on the size of a row alone, so a row has the same bits among any others.
#include "launch.h"
#include "vector16.cuh"

namespace specblock {
namespace {

constexpr int kFewThreads = 512;

__device__ float block_sum(float mine, float* of_warps) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, step);
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  if (lane == 0) of_warps[threadIdx.x / 32] = mine;
  __syncthreads();
  float all = lane < warps ? of_warps[lane] : 0.0f;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) all += __shfl_xor_sync(0xffffffffu, all, step);
  return all;
}

template <class T>
__global__ void __launch_bounds__(kNormThreads) norm_kernel(const NormInputs a) {
  constexpr int kWidth = Vector16<T>::kSize;
  __shared__ float of_warps[kNormThreads / 32];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * a.size;
  const int vectors = static_cast<int>(a.size / kWidth);
  Vector16<T> held[kNormHeld];
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < kNormHeld; j++) {
    const int v = threadIdx.x + j * blockDim.x;
    if (v >= vectors) continue;
    held[j].load(static_cast<const T*>(a.x) + row + v * kWidth);
    if (a.residual != nullptr) {
      Vector16<T> more;
      more.load(static_cast<const T*>(a.residual) + row + v * kWidth);
#pragma unroll
      for (int i = 0; i < kWidth; i++) held[j].set(i, held[j][i] + more[i]);
      held[j].store(static_cast<T*>(a.sum) + row + v * kWidth);
    }
#pragma unroll
    for (int i = 0; i < kWidth; i++) squares += held[j][i] * held[j][i];
  }
  const float scale = rsqrtf(block_sum(squares, of_warps) / static_cast<float>(a.size) + a.eps);
#pragma unroll
  for (int j = 0; j < kNormHeld; j++) {
    const int v = threadIdx.x + j * blockDim.x;
    if (v >= vectors) continue;
    Vector16<T> weight;
    weight.load(static_cast<const T*>(a.weight) + v * kWidth);
    // As transformers rounds: the normalised row in its own type, then the product.
#pragma unroll
    for (int i = 0; i < kWidth; i++) held[j].set(i, rounded<T>(held[j][i] * scale) * weight[i]);
    held[j].store(static_cast<T*>(a.out) + row + v * kWidth);
  }
}

template <class T>
const char* launch(const NormInputs& a, void* stream) {
  const int64_t vectors = a.size / Vector16<T>::kSize;
  if (vectors > kNormVectors) return "the rows are too long";
  const int64_t needed = (vectors + 31) / 32 * 32;
  const int64_t few = needed < kFewThreads ? needed : kFewThreads;
  const auto threads = static_cast<unsigned>(vectors > kFewThreads * kNormHeld ? kNormThreads : few);
  norm_kernel<T><<<static_cast<unsigned>(a.rows), threads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return launch_error();
}

}  // namespace

const char* launch_norm(const NormInputs& inputs, void* stream) {
  if (inputs.rows * inputs.size == 0) return nullptr;
  return of_type(inputs.type, [&](auto value) { return launch<decltype(value)>(inputs, stream); });
}

}  // namespace specblock

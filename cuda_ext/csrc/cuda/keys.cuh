// Logits of every type as numbers, and numbers as unsigned keys in their order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace specblock {

template <class Logit>
__device__ __forceinline__ double widened(Logit logit) {
  if constexpr (sizeof(Logit) == 2) return static_cast<double>(static_cast<float>(logit));
  else return static_cast<double>(logit);
}

// In the order of the values, -0 below 0.
__device__ __forceinline__ uint32_t ordered_key(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7FFFFFFFu : ~key); }

__device__ __forceinline__ uint64_t ordered_key(double value) {
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(value));
  return bits >> 63 ? ~bits : bits | 0x8000000000000000u;
}

__device__ __forceinline__ double value_of(uint64_t key) {
  return __longlong_as_double(static_cast<long long>(key >> 63 ? key & 0x7FFFFFFFFFFFFFFFu : ~key));
}

}  // namespace specblock

// Vectors of 16 bytes of any float type, computed with in float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "layer.h"

namespace specblock {

__device__ inline float widened(float x) { return x; }
__device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widened(__half x) { return __half2float(x); }

template <class T>
__device__ inline T narrowed(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// What is left of x in the type.
template <class T>
__device__ inline float rounded(float x) {
  return widened(narrowed<T>(x));
}

template <class T>
struct Vector16 {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];

  __device__ void load(const T* from) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    memcpy(value, &bits, sizeof bits);
  }
  __device__ void store(T* to) const {
    uint4 bits;
    memcpy(&bits, value, sizeof bits);
    *reinterpret_cast<uint4*>(to) = bits;
  }
  __device__ float operator[](int i) const { return widened(value[i]); }
  __device__ void set(int i, float x) { value[i] = narrowed<T>(x); }
};

// Calls `launch` with a value of the type.
template <class Launch>
const char* of_type(FloatType type, const Launch& launch) {
  if (type == FloatType::kBfloat16) return launch(__nv_bfloat16{});
  if (type == FloatType::kHalf) return launch(__half{});
  return launch(float{});
}

}  // namespace specblock

// SwiGLU's middle: silu(gate) * up.
#pragma once

#include <algorithm>

#include "vector.h"

namespace {

SB_INLINE Float silu(Float x) {
  const Float zero = {};
  const Float e = exp_negative(x < zero ? x : -x);  // e^-|x|
  return x * ((x < zero ? e : broadcast(1.0f)) / (e + 1.0f));
}

// gate[i] = silu(gate[i]) * up[i]; the same for an element wherever it lies.
SB_INLINE void gate(float* gate, const float* up, int64_t size) {
  int64_t i = 0;
  for (; i + L <= size; i += L) store(gate + i, silu(load(gate + i)) * load(up + i));
  if (i == size) return;
  float left[L] = {}, right[L] = {};
  std::copy(gate + i, gate + size, left);
  std::copy(up + i, up + size, right);
  float mixed[L];
  store(mixed, silu(load(left)) * load(right));
  std::copy(mixed, mixed + (size - i), gate + i);
}

}  // namespace

// Root-mean-square norm of one row at a time.
#pragma once

#include <cmath>

#include "vector.h"

namespace {

// Sixteen partial sums whatever the vector width, so that every machine adds in the same order.
SB_INLINE void normalise(const float* x, const float* weight, float* out, int64_t rows, int64_t size, float eps) {
  constexpr int C = 16 / L;
  for (int64_t row = 0; row < rows; row++, x += size, out += size) {
    Float sums[C] = {};
    int64_t i = 0;
    for (; i + 16 <= size; i += 16)
      for (int c = 0; c < C; c++) {
        const auto value = load(x + i + c * L);
        sums[c] += value * value;
      }
    float lanes[16], total = 0.0f;
    for (int c = 0; c < C; c++) store(lanes + c * L, sums[c]);
    for (float lane : lanes) total += lane;
    for (int64_t rest = i; rest < size; rest++) total += x[rest] * x[rest];
    const float scale = 1.0f / std::sqrt(total / static_cast<float>(size) + eps);
    for (i = 0; i + L <= size; i += L) store(out + i, load(x + i) * scale * load(weight + i));
    for (; i < size; i++) out[i] = x[i] * scale * weight[i];
  }
}

}  // namespace

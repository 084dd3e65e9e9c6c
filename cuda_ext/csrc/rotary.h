// Rotary position embedding of one head, in the half-split layout.
#pragma once

#include <cstdint>

namespace specblock {

inline void rotate(float* head, const float* cosine, const float* sine, int64_t size) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; i++) {
    const float left = head[i], right = head[i + half];
    head[i] = left * cosine[i] - right * sine[i];
    head[i + half] = right * cosine[i + half] + left * sine[i + half];
  }
}

}  // namespace specblock

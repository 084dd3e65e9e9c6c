// Vectors of SB_LANES floats through the compiler's own vector types: one source for every instruction set.
// Included by each kernels_*.cpp after it has chosen its instruction set; everything here is private to that file.
#pragma once

#include <cstdint>
#include <cstring>

#define SB_INLINE __attribute__((always_inline)) inline

namespace {

constexpr int L = SB_LANES;
typedef float Float __attribute__((vector_size(L * 4)));
typedef uint32_t Word __attribute__((vector_size(L * 4)));

SB_INLINE Float load(const float* from) {
  Float value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

SB_INLINE void store(float* to, Float value) { std::memcpy(to, &value, sizeof value); }

SB_INLINE Float broadcast(float value) { return value - Float{}; }

// e^x for x <= 0, to about 1e-7 relative; exactly 0 below -87.
SB_INLINE Float exp_negative(Float x) {
  const auto under = x < -87.0f;
  x = under ? broadcast(-87.0f) : x;
  // x = n ln 2 + r; adding 1.5 * 2^23 leaves round(x / ln 2) in the low bits.
  constexpr float kMagic = 12582912.0f;
  const Float shifted = x * 1.44269504088896341f + kMagic;
  Word bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const Float n = shifted - kMagic;
  Float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Float p = r * 1.9875691500e-4f + 1.3981999507e-3f;  // minimax polynomial of (e^r - 1 - r) / r^2
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Word scale = (bits + 127u) << 23;  // 2^n; the magic's own bits are shifted out
  Float power;
  std::memcpy(&power, &scale, sizeof power);
  return under ? Float{} : p * power;
}

}  // namespace

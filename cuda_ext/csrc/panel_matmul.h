// Products of few rows with a packed weight matrix, on one core.
//
// A weight [N, K] is stored in panels of 16 output columns, [N / 16, K, 16], so that one cache line after the other is
// read exactly once and every value is multiplied with all rows while it is in a register. Weights may be bfloat16:
// widening is exact, and half the bytes come from memory, which is what few rows wait for.
//
// Every output is ONE chain of fused multiply-adds over k, in order. So a row's result does not depend on how many
// other rows there are, nor on the vector width of the machine: what a request gets alone and in a batch is the same
// bits. (Without FMA instructions the chain rounds twice per step; still the same for any number of rows.)
#pragma once

#include <vector>

#include "kernels.h"
#include "vector.h"

namespace {

using specblock::kPanel;
constexpr int64_t kTileRows = 6;  // 6 rows x 16 columns are 12 of the 16 vector registers of AVX2

// One row of a panel, 16 weights in kPanel / L vectors.
SB_INLINE void load_row(const float* from, Float* to) {
  for (int c = 0; c < kPanel / L; c++) to[c] = load(from + c * L);
}

// In bfloat16 the columns j and j + 8 share a word, low and high half: two vectors for one load, a shift and a mask.
SB_INLINE void load_row(const uint16_t* from, Float* to) {
#if SB_LANES == 16
  typedef uint32_t Words __attribute__((vector_size(32)));
  Words words;
  std::memcpy(&words, from, sizeof words);
  const Words low = words << 16, high = words & 0xffff0000u;
  float both[16];
  std::memcpy(both, &low, sizeof low);
  std::memcpy(both + 8, &high, sizeof high);
  to[0] = load(both);
#else
  constexpr int kHalf = kPanel / L / 2;
  for (int c = 0; c < kHalf; c++) {
    Word words;
    std::memcpy(&words, from + 2 * c * L, sizeof words);
    const Word low = words << 16, high = words & 0xffff0000u;
    std::memcpy(to + c, &low, sizeof low);
    std::memcpy(to + kHalf + c, &high, sizeof high);
  }
#endif
}

// out[R][P * 16] = x[R][K] times P neighbouring panels.
template <int R, int P, class W>
SB_INLINE void tile(const float* x, const W* panels, float* out, int64_t out_stride, int64_t K) {
  constexpr int C = kPanel / L;
  Float sum[R][P][C] = {};
  for (int64_t k = 0; k < K; k++) {
    Float weight[P][C];
    for (int p = 0; p < P; p++) {
      const W* row = panels + (p * K + k) * kPanel;
      __builtin_prefetch(row + P * K * kPanel);  // the next panels: memory and arithmetic overlap
      load_row(row, weight[p]);
    }
    for (int r = 0; r < R; r++) {
      const auto value = broadcast(x[r * K + k]);
      for (int p = 0; p < P; p++)
        for (int c = 0; c < C; c++) sum[r][p][c] += value * weight[p][c];
    }
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++)
      for (int c = 0; c < C; c++) store(out + r * out_stride + p * kPanel + c * L, sum[r][p][c]);
}

// All rows times one panel, in tiles of equal height.
template <class W>
SB_INLINE void all_rows(const float* x, const W* panel, float* out, int64_t out_stride, int64_t M, int64_t K) {
  for (int64_t m = 0; m < M;) {
    const int64_t left = M - m, tiles = (left + kTileRows - 1) / kTileRows, take = (left + tiles - 1) / tiles;
    const float* rows = x + m * K;
    float* to = out + m * out_stride;
    switch (take) {
      case 1: tile<1, 1, W>(rows, panel, to, out_stride, K); break;
      case 2: tile<2, 1, W>(rows, panel, to, out_stride, K); break;
      case 3: tile<3, 1, W>(rows, panel, to, out_stride, K); break;
      case 4: tile<4, 1, W>(rows, panel, to, out_stride, K); break;
      case 5: tile<5, 1, W>(rows, panel, to, out_stride, K); break;
      default: tile<6, 1, W>(rows, panel, to, out_stride, K); break;
    }
    m += take;
  }
}

// One to three rows leave registers free: several panels at once, or the adds would wait for each other.
template <int R, int P, class W>
SB_INLINE int64_t several_panels(const float* x, const W* packed, float* out, int64_t N, int64_t K, int64_t begin,
                                 int64_t end) {
  for (; begin + P <= end; begin += P)
    tile<R, P, W>(x, packed + begin * K * kPanel, out + begin * kPanel, N, K);
  return begin;
}

// out[M, N] of the panels begin .. end; the last panel of the matrix may stand for fewer than 16 columns.
template <class W>
SB_INLINE void multiply(const float* x, const W* packed, float* out, int64_t M, int64_t K, int64_t N, int64_t begin,
                        int64_t end) {
  const int64_t whole = end * kPanel <= N ? end : end - 1;
  if (M == 1) begin = several_panels<1, 4, W>(x, packed, out, N, K, begin, whole);
  if (M == 2) begin = several_panels<2, 3, W>(x, packed, out, N, K, begin, whole);
  if (M == 3) begin = several_panels<3, 2, W>(x, packed, out, N, K, begin, whole);
  for (; begin < whole; begin++) all_rows<W>(x, packed + begin * K * kPanel, out + begin * kPanel, N, M, K);
  if (whole == end) return;
  std::vector<float> part(M * kPanel);
  all_rows<W>(x, packed + whole * K * kPanel, part.data(), kPanel, M, K);
  for (int64_t m = 0; m < M; m++)
    std::memcpy(out + m * N + whole * kPanel, part.data() + m * kPanel, (N - whole * kPanel) * sizeof(float));
}

// Without a matrix unit there is nothing to gain by rounding x.
inline void multiply_half(const float* x, const uint16_t* packed, float* out, int64_t M, int64_t K, int64_t N,
                          int64_t begin, int64_t end, bool /*coarse*/) {
  multiply<uint16_t>(x, packed, out, M, K, N, begin, end);
}

}  // namespace

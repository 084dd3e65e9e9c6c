// Products of rows rounded to bfloat16 with packed bfloat16 weights, where the processor multiplies pairs of them and adds in
// float32 (AVX-512 BF16): half the instructions of panel_matmul.h, so that eight rows cost little more than one.
//
// Every output is one chain of additions in a fixed order: a row's result does not depend on how many other rows there are.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bfloat16_rows.h"
#include "panel_matmul.h"

namespace {

// Neighbouring inputs of R rows [R][pairs] times P neighbouring panels: out[R][P * 16].
template <int R, int P>
SB_INLINE void pair_tile(const uint32_t* x, int64_t pairs, const uint16_t* panels, float* out, int64_t out_stride, int64_t K) {
  const __m512i pairing_order = pairing(), columns = column_order();
  __m512 sum[R][P];
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) sum[r][p] = _mm512_setzero_ps();
  const auto add = [&](int64_t pair, const auto& weights) {
    __m512bh weight[P];
    for (int p = 0; p < P; p++) {
      const __m512i paired = _mm512_permutexvar_epi16(pairing_order, weights(panels + (p * K + 2 * pair) * kPanel));
      std::memcpy(weight + p, &paired, sizeof paired);
    }
    for (int r = 0; r < R; r++) {
      const __m512i both = _mm512_set1_epi32(static_cast<int>(x[r * pairs + pair]));
      __m512bh value;
      std::memcpy(&value, &both, sizeof both);
      for (int p = 0; p < P; p++) sum[r][p] = _mm512_dpbf16_ps(sum[r][p], value, weight[p]);
    }
  };
  for (int64_t pair = 0; pair < K / 2; pair++)
    add(pair, [&](const uint16_t* row) {
      __builtin_prefetch(row + P * K * kPanel, 0, 2);  // see panel_matmul.h
      return _mm512_loadu_si512(row);
    });
  if (K % 2 != 0)  // the last input has no neighbour
    add(K / 2, [&](const uint16_t* row) { return _mm512_maskz_loadu_epi16(0xffffu, row); });
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++)
      _mm512_storeu_ps(out + r * out_stride + p * kPanel, _mm512_permutexvar_ps(columns, sum[r][p]));
}

// Rows as neighbouring inputs.
struct PairTiles {
  const uint32_t* rows;
  int64_t pairs;

  template <int R, int P>
  SB_INLINE void tile(int64_t first, const uint16_t* panels, float* out, int64_t out_stride, int64_t K) const {
    pair_tile<R, P>(rows + first * pairs, pairs, panels, out, out_stride, K);
  }
};

inline void multiply_pairs(const float* x, const uint16_t* packed, float* out, int64_t M, int64_t K, int64_t N,
                           int64_t begin, int64_t end) {
  constexpr int64_t kMost = 128;  // rows whose rounded values take little memory
  const int64_t depth = (K + 15) / 16 * 16, most = std::min(M, kMost);
  Lines<uint16_t> rounded(most * depth);
  for (int64_t m = 0; m < M; m += kMost) {
    const int64_t rows = std::min(M - m, kMost);
    split<1>(x + m * K, rows, K, rows, depth, rounded.data());
    const PairTiles tiles{reinterpret_cast<const uint32_t*>(rounded.data()), depth / 2};
    multiply_by_tiles(tiles, packed, out + m * N, rows, K, N, begin, end);
  }
}

// `coarse` rows are rounded; others keep all their bits.
inline void multiply_either(const float* x, const uint16_t* packed, float* out, int64_t M, int64_t K, int64_t N,
                            int64_t begin, int64_t end, bool coarse) {
  if (coarse)
    multiply_pairs(x, packed, out, M, K, N, begin, end);
  else
    multiply<uint16_t>(x, packed, out, M, K, N, begin, end);
}

}  // namespace

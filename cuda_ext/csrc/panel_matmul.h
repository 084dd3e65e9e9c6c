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

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "vector.h"
#if SB_LANES == 16
#include <immintrin.h>  // included before the instruction set was chosen
#endif

namespace {

using specblock::kPanel;
constexpr int kVectors = kPanel / L;  // of a row of a panel
// What fits into the registers: sums, beside weights and a value of x. AVX-512 and ARM have 32 of them, the others 16.
#if defined(__aarch64__)
constexpr bool kManyRegisters = true;
#else
constexpr bool kManyRegisters = L == 16;
#endif
constexpr int kTileRows = L == 16 ? 8 : 6, kSums = kManyRegisters ? 26 : 12;
// Neighbouring panels for R rows: few rows alone would leave additions waiting for each other.
constexpr int kMostSide = 3;  // of tiles at least half as high as the highest, as several are
template <int R>
constexpr int kSide = std::clamp(kSums / (R * kVectors), 1, R < kTileRows / 2 ? 4 : kMostSide);

// Panels that stay in the second cache while one tile of rows after the other wants them: a multiple of 1 .. kMostSide,
// or some tiles would have to take one by one what does not fit side by side.
constexpr int64_t kSides = 6, kMostTogether = 12, kTogetherBytes = 1 << 19;

// One row of a panel, 16 weights in kPanel / L vectors.
SB_INLINE void load_row(const float* from, Float* to) {
  for (int c = 0; c < kPanel / L; c++) to[c] = load(from + c * L);
}

// In bfloat16 the columns j and j + 8 share a word, low and high half: two vectors for one load, a shift and a mask.
SB_INLINE void load_row(const uint16_t* from, Float* to) {
#if SB_LANES == 16
  // One vector holds the words twice: what is shifted in its lower half stays in its upper one. (Intrinsics: what compilers
  // make of their own vector types here goes through memory.)
  const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  const __m512i shift = _mm512_setr_epi32(16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512i both = _mm512_and_si512(_mm512_sllv_epi32(twice, shift), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  std::memcpy(to, &both, sizeof both);
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
  Float sum[R][P][kVectors] = {};
  for (int64_t k = 0; k < K; k++) {
    Float weight[P][kVectors];
    for (int p = 0; p < P; p++) {
      const W* row = panels + (p * K + k) * kPanel;
      __builtin_prefetch(row + P * K * kPanel, 0, 2);  // the next panels: memory and arithmetic overlap
      load_row(row, weight[p]);
    }
    for (int r = 0; r < R; r++) {
      const auto value = broadcast(x[r * K + k]);
      for (int p = 0; p < P; p++)
        for (int c = 0; c < kVectors; c++) sum[r][p][c] += value * weight[p][c];
    }
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++)
      for (int c = 0; c < kVectors; c++) store(out + r * out_stride + p * kPanel + c * L, sum[r][p][c]);
}

// Rows as they are.
struct WholeTiles {
  const float* rows;

  template <int R, int P, class W>
  SB_INLINE void tile(int64_t first, const W* panels, float* out, int64_t out_stride, int64_t K) const {
    ::tile<R, P, W>(rows + first * K, panels, out, out_stride, K);
  }
};

// At most R rows, from `first` on, times the panels begin .. end.
template <int R, class T, class W>
SB_INLINE void few_rows(int64_t rows, const T& tiles, int64_t first, const W* packed, float* out, int64_t out_stride,
                        int64_t K, int64_t begin, int64_t end) {
  if constexpr (R > 1)
    if (rows < R) return few_rows<R - 1>(rows, tiles, first, packed, out, out_stride, K, begin, end);
  constexpr int P = kSide<R>;
  for (; begin + P <= end; begin += P)
    tiles.template tile<R, P>(first, packed + begin * K * kPanel, out + begin * kPanel, out_stride, K);
  for (; begin < end; begin++)
    tiles.template tile<R, 1>(first, packed + begin * K * kPanel, out + begin * kPanel, out_stride, K);
}

// All rows times the panels begin .. end, in tiles of equal height.
template <class T, class W>
SB_INLINE void all_rows(const T& tiles, const W* packed, float* out, int64_t out_stride, int64_t M, int64_t K,
                        int64_t begin, int64_t end) {
  for (int64_t m = 0; m < M;) {
    const int64_t left = M - m, count = (left + kTileRows - 1) / kTileRows, take = (left + count - 1) / count;
    few_rows<kTileRows>(take, tiles, m, packed, out + m * out_stride, out_stride, K, begin, end);
    m += take;
  }
}

// out[M, N] of the panels begin .. end; the last panel of the matrix may stand for fewer than 16 columns.
template <class T, class W>
SB_INLINE void multiply_by_tiles(const T& tiles, const W* packed, float* out, int64_t M, int64_t K, int64_t N,
                                 int64_t begin, int64_t end) {
  const int64_t whole = end * kPanel <= N ? end : end - 1, fitting = kTogetherBytes / (K * kPanel * sizeof(W));
  const int64_t together = M <= kTileRows ? end : std::clamp<int64_t>(fitting / kSides * kSides, kMostSide, kMostTogether);
  for (; begin < whole; begin += together)
    all_rows(tiles, packed, out, N, M, K, begin, std::min(begin + together, whole));
  if (whole == end) return;
  std::vector<float> part(M * kPanel);
  all_rows(tiles, packed + whole * K * kPanel, part.data(), kPanel, M, K, 0, 1);
  for (int64_t m = 0; m < M; m++)
    std::memcpy(out + m * N + whole * kPanel, part.data() + m * kPanel, (N - whole * kPanel) * sizeof(float));
}

template <class W>
SB_INLINE void multiply(const float* x, const W* packed, float* out, int64_t M, int64_t K, int64_t N, int64_t begin,
                        int64_t end) {
  multiply_by_tiles(WholeTiles{x}, packed, out, M, K, N, begin, end);
}

// Without products of bfloat16 numbers there is nothing to gain by rounding x.
inline void multiply_half(const float* x, const uint16_t* packed, float* out, int64_t M, int64_t K, int64_t N,
                          int64_t begin, int64_t end, bool /*coarse*/) {
  multiply<uint16_t>(x, packed, out, M, K, N, begin, end);
}

}  // namespace

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

#include <cstdint>
#include <cstring>
#include <vector>

namespace specblock {

constexpr int64_t kPanel = 16;     // output columns per panel
constexpr int64_t kTileRows = 6;   // 6 rows x 16 columns are 12 of the 16 vector registers of AVX2
constexpr int64_t kWidenRows = 13; // from here on a panel is read three times or more: widen it once

#define SB_INLINE __attribute__((always_inline)) inline

// L is the number of float lanes in a vector register.
template <int L>
struct Vector {
  typedef float Float __attribute__((vector_size(L * 4)));
  typedef uint32_t Word __attribute__((vector_size(L * 4)));
  typedef uint16_t Half __attribute__((vector_size(L * 2)));
};

template <int L>
SB_INLINE typename Vector<L>::Float load(const float* from) {
  typename Vector<L>::Float value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <int L>
SB_INLINE typename Vector<L>::Float load(const uint16_t* from) {  // bfloat16: the upper half of a float
  typename Vector<L>::Half half;
  std::memcpy(&half, from, sizeof half);
  typename Vector<L>::Word word = __builtin_convertvector(half, typename Vector<L>::Word) << 16;
  typename Vector<L>::Float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// out[R][P * 16] = x[R][K] times P neighbouring panels.
template <int L, int R, int P, class W>
SB_INLINE void tile(const float* x, const W* panels, float* out, int64_t out_stride, int64_t K) {
  constexpr int C = kPanel / L;
  typename Vector<L>::Float sum[R][P][C] = {};
  for (int64_t k = 0; k < K; k++) {
    typename Vector<L>::Float weight[P][C];
    for (int p = 0; p < P; p++)
      for (int c = 0; c < C; c++) weight[p][c] = load<L>(panels + (p * K + k) * kPanel + c * L);
    for (int r = 0; r < R; r++) {
      typename Vector<L>::Float value = x[r * K + k] - typename Vector<L>::Float{};  // broadcast
      for (int p = 0; p < P; p++)
        for (int c = 0; c < C; c++) sum[r][p][c] += value * weight[p][c];
    }
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++)
      for (int c = 0; c < C; c++) std::memcpy(out + r * out_stride + p * kPanel + c * L, &sum[r][p][c], L * 4);
}

// All rows times one panel, in tiles of equal height.
template <int L, class W>
SB_INLINE void all_rows(const float* x, const W* panel, float* out, int64_t out_stride, int64_t M, int64_t K) {
  for (int64_t m = 0; m < M;) {
    const int64_t left = M - m, tiles = (left + kTileRows - 1) / kTileRows, take = (left + tiles - 1) / tiles;
    const float* rows = x + m * K;
    float* to = out + m * out_stride;
    switch (take) {
      case 1: tile<L, 1, 1, W>(rows, panel, to, out_stride, K); break;
      case 2: tile<L, 2, 1, W>(rows, panel, to, out_stride, K); break;
      case 3: tile<L, 3, 1, W>(rows, panel, to, out_stride, K); break;
      case 4: tile<L, 4, 1, W>(rows, panel, to, out_stride, K); break;
      case 5: tile<L, 5, 1, W>(rows, panel, to, out_stride, K); break;
      default: tile<L, 6, 1, W>(rows, panel, to, out_stride, K); break;
    }
    m += take;
  }
}

// One to three rows leave registers free: several panels at once, or the adds would wait for each other.
template <int L, int R, int P, class W>
SB_INLINE int64_t several_panels(const float* x, const W* packed, float* out, int64_t N, int64_t K, int64_t begin,
                                 int64_t end) {
  for (; begin + P <= end; begin += P)
    tile<L, R, P, W>(x, packed + begin * K * kPanel, out + begin * kPanel, N, K);
  return begin;
}

// out[M, N] of the panels begin .. end; the last panel of the matrix may stand for fewer than 16 columns.
template <int L, class W>
SB_INLINE void multiply(const float* x, const W* packed, float* out, int64_t M, int64_t K, int64_t N, int64_t begin,
                        int64_t end) {
  const int64_t whole = end * kPanel <= N ? end : end - 1;
  std::vector<float> wide(M >= kWidenRows && sizeof(W) == 2 ? K * kPanel : 0);
  if (M == 1) begin = several_panels<L, 1, 4, W>(x, packed, out, N, K, begin, whole);
  if (M == 2) begin = several_panels<L, 2, 3, W>(x, packed, out, N, K, begin, whole);
  if (M == 3) begin = several_panels<L, 3, 2, W>(x, packed, out, N, K, begin, whole);
  for (; begin < whole; begin++) {
    const W* panel = packed + begin * K * kPanel;
    if (wide.empty()) {
      all_rows<L, W>(x, panel, out + begin * kPanel, N, M, K);
      continue;
    }
    for (int64_t i = 0; i < K * kPanel; i += L) {
      auto value = load<L>(panel + i);
      std::memcpy(wide.data() + i, &value, sizeof value);
    }
    all_rows<L, float>(x, wide.data(), out + begin * kPanel, N, M, K);
  }
  if (whole == end) return;
  std::vector<float> part(M * kPanel);
  all_rows<L, W>(x, packed + whole * K * kPanel, part.data(), kPanel, M, K);
  for (int64_t m = 0; m < M; m++)
    std::memcpy(out + m * N + whole * kPanel, part.data() + m * kPanel, (N - whole * kPanel) * sizeof(float));
}

// The widest version that this processor runs.
#if defined(__x86_64__)
template <class W>
__attribute__((target("avx512f,avx2,fma"))) void multiply_512(const float* x, const W* packed, float* out, int64_t M,
                                                              int64_t K, int64_t N, int64_t begin, int64_t end) {
  multiply<16, W>(x, packed, out, M, K, N, begin, end);
}

template <class W>
__attribute__((target("avx2,fma"))) void multiply_256(const float* x, const W* packed, float* out, int64_t M,
                                                      int64_t K, int64_t N, int64_t begin, int64_t end) {
  multiply<8, W>(x, packed, out, M, K, N, begin, end);
}
#endif

template <class W>
void multiply_any(const float* x, const W* packed, float* out, int64_t M, int64_t K, int64_t N, int64_t begin,
                  int64_t end) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return multiply_512<W>(x, packed, out, M, K, N, begin, end);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return multiply_256<W>(x, packed, out, M, K, N, begin, end);
#endif
  multiply<4, W>(x, packed, out, M, K, N, begin, end);
}

}  // namespace specblock

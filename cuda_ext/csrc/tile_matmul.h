// Products with packed bfloat16 weights on a processor's matrix unit (AMX), in float32.
//
// The unit multiplies bfloat16 and adds in float32. A float32 value is exactly the sum of three bfloat16 numbers, its
// leading, middle and last eight bits, so three passes give a float32 product, and some rows cost little more than one.
// Where that much is not wanted, one pass over rounded values does: a third of the work, for many rows of it.
// (The unit takes numbers below 2^-126 for zero, so values below about 2^-103 lose bits; of those nothing depends on.)
//
// An output is one chain of additions in a fixed order, so it does not depend on how many other rows there are. (The chain is
// not that of panel_matmul.h: its bits are those of processors without this unit.)
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "bfloat16_rows.h"
#include "kernels.h"

namespace {

using specblock::kPanel;
constexpr int64_t kTile = 16, kDepth = 32;  // rows of a tile; inputs that one step multiplies
constexpr int kExact = 3, kPanels = 3;  // parts of a value; panels that are multiplied side by side

struct alignas(64) TileShape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

// The compiler's tile functions do not all say that they read memory: what was stored before stays before.
#define SB_STORED() __asm__ volatile("" ::: "memory")

// Tiles 0 to 2 hold sums, 3 to 5 the parts of x, 6 and 7 weights.
SB_INLINE void shape_tiles(int64_t rows) {
  TileShape shape;
  for (int i = 0; i < 8; i++) {
    shape.bytes_per_row[i] = 64;
    shape.rows[i] = static_cast<uint8_t>(i >= 6 ? kTile : rows);
  }
  SB_STORED();
  _tile_loadconfig(&shape);
}

// One step of a panel [K][16], from input k on, as the unit wants it: [16][16 columns][2 neighbouring inputs].
SB_INLINE void interleave(const uint16_t* panel, int64_t k, int64_t K, __m512i order, uint16_t* to) {
  const uint16_t* from = panel + k * kPanel;
  if (K - k >= kDepth) {
#pragma GCC unroll 16
    for (int i = 0; i < kDepth / 2; i++)
      _mm512_store_si512(to + i * 32, _mm512_permutexvar_epi16(order, _mm512_loadu_si512(from + i * 32)));
    return;
  }
  for (int i = 0; i < kDepth / 2; i++) {
    const int64_t held = K - k - 2 * i;
    const __mmask32 inside = held >= 2 ? 0xffffffffu : held == 1 ? 0xffffu : 0u;
    _mm512_store_si512(to + i * 32, _mm512_permutexvar_epi16(order, _mm512_maskz_loadu_epi16(inside, from + i * 32)));
  }
}

// Where the steps of up to three panels lie once they are interleaved: all of them, or if nobody comes back to them a few.
struct Interleaved {
  uint16_t* data;
  int64_t kept;  // steps, a power of two unless it is all of them
  bool all;

  SB_INLINE uint16_t* at(int64_t panel, int64_t step) const {
    return data + (panel * kept + (all ? step : step & (kept - 1))) * kDepth * kPanel;
  }
};

// sum += x times the weights in a tile, the leading parts first. Sums and weights of different panels alternate: an addition
// takes three times as long as the next one waits to begin.
#define SB_ADD(sum, weights) \
  _tile_dpbf16ps(sum, 3, weights); \
  _tile_dpbf16ps(sum, 4, weights); \
  _tile_dpbf16ps(sum, 5, weights)
#define SB_ADD_BOTH() \
  _tile_dpbf16ps(0, 3, 6); \
  _tile_dpbf16ps(1, 3, 7); \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(0, 5, 6); \
  _tile_dpbf16ps(1, 5, 7)

// Sums of one tile of rows and P panels (1 to 3): sums[P][16][16].
// The first tile of rows interleaves the weights as it goes, so that memory and the unit work at the same time.
template <int P, bool kFirst, int kParts>
inline void tile_product(const uint16_t* parts, int64_t part_size, int64_t row_size, const uint16_t* panels, int64_t K,
                         __m512i order, const Interleaved& weights, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  for (int64_t k = 0, step = 0; k < K; k += kDepth, step++) {
    if constexpr (kFirst) {
      for (int p = 0; p < P; p++) {
        const uint16_t* panel = panels + p * K * kPanel;
        for (int i = 0; i < kDepth / 2; i++) __builtin_prefetch(panel + (P * K + k) * kPanel + i * 32);  // the next ones
        interleave(panel, k, K, order, weights.at(p, step));
      }
    }
    SB_STORED();
    _tile_loadd(3, parts + k, row_size * 2);
    if constexpr (kParts == kExact) {
      _tile_loadd(4, parts + part_size + k, row_size * 2);
      _tile_loadd(5, parts + 2 * part_size + k, row_size * 2);
    }
    _tile_loadd(6, weights.at(0, step), 64);
    if constexpr (P > 1) _tile_loadd(7, weights.at(1, step), 64);
    if constexpr (kParts == 1) {
      _tile_dpbf16ps(0, 3, 6);
      if constexpr (P > 1) _tile_dpbf16ps(1, 3, 7);
    } else if constexpr (P == 1) {
      SB_ADD(0, 6);
    } else {
      SB_ADD_BOTH();
    }
    if constexpr (P == 3) {
      _tile_loadd(6, weights.at(2, step), 64);
      if constexpr (kParts == 1) {
        _tile_dpbf16ps(2, 3, 6);
      } else {
        SB_ADD(2, 6);
      }
    }
  }
  _tile_stored(0, sums, 64);
  if constexpr (P >= 2) _tile_stored(1, sums + 256, 64);
  if constexpr (P == 3) _tile_stored(2, sums + 512, 64);
  SB_STORED();
}
#undef SB_ADD
#undef SB_ADD_BOTH

// One tile of rows and `count` panels.
template <int kParts>
inline void tile_products(int64_t count, bool first, const uint16_t* parts, int64_t part_size, int64_t row_size,
                          const uint16_t* panels, int64_t K, __m512i order, const Interleaved& weights, float* sums) {
  const auto run = [&](auto product) { product(parts, part_size, row_size, panels, K, order, weights, sums); };
  switch (count) {
    case 1: first ? run(tile_product<1, true, kParts>) : run(tile_product<1, false, kParts>); break;
    case 2: first ? run(tile_product<2, true, kParts>) : run(tile_product<2, false, kParts>); break;
    default: first ? run(tile_product<3, true, kParts>) : run(tile_product<3, false, kParts>); break;
  }
}

// out[M, N] of the panels begin .. end; the last panel of the matrix may stand for fewer than 16 columns.
template <int kParts>
inline void multiply_some(const float* x, const uint16_t* packed, float* out, int64_t M, int64_t K, int64_t N,
                          int64_t begin, int64_t end) {
  constexpr int64_t kFewSteps = 4;
  const int64_t tiles = (M + kTile - 1) / kTile, height = (M + tiles - 1) / tiles, rows = tiles * height;
  const int64_t steps = (K + kDepth - 1) / kDepth, depth = steps * kDepth, part_size = rows * depth;
  const int64_t kept = tiles > 1 ? steps : kFewSteps;
  Lines<uint16_t> parts(kParts * part_size), room(kPanels * kept * kDepth * kPanel);
  const Interleaved weights{room.data(), kept, tiles > 1};
  split<kParts>(x, M, K, rows, depth, parts.data());
  const __m512i order = pairing(), index = column_order();
  alignas(64) float sums[kPanels * kTile * kPanel];
  shape_tiles(height);
  for (int64_t panel = begin; panel < end;) {
    const int64_t count = end - panel < kPanels ? end - panel : kPanels;
    const uint16_t* at = packed + panel * K * kPanel;
    for (int64_t first = 0; first < M; first += height) {
      tile_products<kParts>(count, first == 0, parts.data() + first * depth, part_size, depth, at, K, order, weights, sums);
      for (int64_t p = 0; p < count; p++) {
        const int64_t column = (panel + p) * kPanel, there = N - column < kPanel ? N - column : kPanel;
        const auto inside = static_cast<__mmask16>((1u << there) - 1);
        for (int64_t m = 0; m < height && first + m < M; m++) {
          const __m512 sum = _mm512_load_ps(sums + (p * kTile + m) * kPanel);
          _mm512_mask_storeu_ps(out + (first + m) * N + column, inside, _mm512_permutexvar_ps(index, sum));
        }
      }
    }
    panel += count;
  }
  _tile_release();
}

// The same for any number of rows: so many at a time that their parts take little memory.
inline void multiply_tiles(const float* x, const uint16_t* packed, float* out, int64_t M, int64_t K, int64_t N,
                           int64_t begin, int64_t end, bool coarse) {
  constexpr int64_t kMost = 8 * kTile;
  const auto some = coarse ? multiply_some<1> : multiply_some<kExact>;
  for (int64_t m = 0; m < M; m += kMost)
    some(x + m * K, packed, out + m * N, M - m < kMost ? M - m : kMost, K, N, begin, end);
}

}  // namespace

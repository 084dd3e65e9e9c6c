// What a warp of slot attention does with one tile of keys and values, on tensor cores.
//
// It owns 16 or 32 query rows, whose scores, weights and mixture stay in its registers.
#pragma once

#include "slot_attention.cuh"
#include "tensor_core.cuh"

namespace specblock {

constexpr int kTile = kSplitStep;  // keys per update of the running maximum

// One warp's 16 * Frags query rows on their way through the keys.
template <class T, int D, int Frags>
struct WarpRows {
  float mixture[Frags][D / 8][4] = {};
  float top[Frags][2], sum[Frags][2];
  uint32_t held[D / 16][4];  // the query's fragments where there is room for them, with Frags == 1
  int lane;

  __device__ WarpRows() : lane(threadIdx.x % 32) {
    for (int f = 0; f < Frags; f++)
      for (int i = 0; i < 2; i++) top[f][i] = -INFINITY, sum[f][i] = 0.0f;
  }

  // The warp's row that this lane's values i = 0, 1 (columns 0, 1 and 2, 3 of a fragment) belong to.
  __device__ int row(int f, int i) const { return f * 16 + i * 8 + lane / 4; }

  __device__ uint32_t query_lane(uint32_t query) const { return query + place<D>(lane % 16, lane / 16); }

  __device__ void hold(uint32_t query) {
    if constexpr (Frags == 1)
#pragma unroll
      for (int d = 0; d < D / 16; d++) load_matrices(held[d], query_lane(query) ^ (d * 32));
  }

  // scores[f][n] = the products of the warp's rows with keys 8 n .. 8 n + 7 of the tile.
  __device__ void score(float (&scores)[Frags][kTile / 8][4], uint32_t query, uint32_t key) const {
    const uint32_t key_lane = key + place<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int f = 0; f < Frags; f++)
#pragma unroll
      for (int n = 0; n < kTile / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) scores[f][n][e] = 0.0f;
#pragma unroll
    for (int d = 0; d < D / 16; d++) {
      uint32_t q[Frags][4];
#pragma unroll
      for (int f = 0; f < Frags; f++) {
        if constexpr (Frags == 1) {
#pragma unroll
          for (int j = 0; j < 4; j++) q[f][j] = held[d][j];
        } else {
          load_matrices(q[f], (query_lane(query) ^ (d * 32)) + f * 16 * D * 2);
        }
      }
#pragma unroll
      for (int n = 0; n < kTile / 16; n++) {
        uint32_t k[4];
        load_matrices(k, (key_lane ^ (d * 32)) + n * 16 * D * 2);
#pragma unroll
        for (int f = 0; f < Frags; f++) {
          multiply(scores[f][2 * n], q[f], k[0], k[1], T());
          multiply(scores[f][2 * n + 1], q[f], k[2], k[3], T());
        }
      }
    }
  }

  // `hidden`: what find_hidden found.
  __device__ void hide(float (&scores)[Frags][kTile / 8][4], const uint2* hidden, const SlotAttention& a, int first_row,
                       int warp_row) const {
#pragma unroll
    for (int f = 0; f < Frags; f++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int m = first_row + warp_row + row(f, i);
        asm volatile("" : "+r"(m));  // or what follows from it would be held in registers all along
        const int heads = a.H / a.G;
        const uint2 both = hidden[min(m / heads, a.R - 1) - first_row / heads];
        const uint32_t mine[2] = {both.x >> (lane % 4 * 2), both.y >> (lane % 4 * 2)};
#pragma unroll
        for (int n = 0; n < kTile / 8; n++)
#pragma unroll
          for (int e = 0; e < 2; e++)
            if (mine[n / 4] >> (n % 4 * 8 + e) & 1) scores[f][n][2 * i + e] = -INFINITY;
      }
  }

  // Scores become weights, relative to a new running maximum; what was mixed so far is brought down to it. To let the
  // maximum lag behind would save some of that, but a row that looks at one key mostly then rounds that key's weight.
  __device__ void weigh(float (&scores)[Frags][kTile / 8][4], float scale_log2) {
    float shrink[Frags][2];
    bool moved = false;
#pragma unroll
    for (int f = 0; f < Frags; f++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float most = top[f][i];
#pragma unroll
        for (int n = 0; n < kTile / 8; n++) most = fmaxf(most, fmaxf(scores[f][n][2 * i], scores[f][n][2 * i + 1]));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        // A row that has seen nothing yet has no maximum: weights 2^(-inf - 0), not 2^(-inf + inf).
        const float base = most == -INFINITY ? 0.0f : most;
        shrink[f][i] = power_of_two(__fmul_rn(__fsub_rn(top[f][i], base), scale_log2));
        moved |= shrink[f][i] != 1.0f;
        const float offset = __fmul_rn(base, -scale_log2);
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < kTile / 8; n++)
#pragma unroll
          for (int e = 2 * i; e < 2 * i + 2; e++) {
            scores[f][n][e] = power_of_two(__fmaf_rn(scores[f][n][e], scale_log2, offset));
            total = __fadd_rn(total, scores[f][n][e]);
          }
        top[f][i] = most;
        sum[f][i] = __fmaf_rn(sum[f][i], shrink[f][i], total);  // of this lane's columns
      }
    if (!__any_sync(0xffffffffu, moved)) return;  // mostly so in a long prefix
#pragma unroll
    for (int f = 0; f < Frags; f++)
#pragma unroll
      for (int n = 0; n < D / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) mixture[f][n][e] = __fmul_rn(mixture[f][n][e], shrink[f][e / 2]);
  }

  // mixture += weights times the values of the tile.
  __device__ void mix(const float (&weights)[Frags][kTile / 8][4], uint32_t value) {
    const uint32_t value_lane = value + place<D>(lane % 16, lane / 16);
#pragma unroll
    for (int n = 0; n < kTile / 16; n++) {
      uint32_t w[Frags][4];
#pragma unroll
      for (int f = 0; f < Frags; f++)
#pragma unroll
        for (int j = 0; j < 4; j++)
          w[f][j] = pack(weights[f][2 * n + j / 2][j % 2 * 2], weights[f][2 * n + j / 2][j % 2 * 2 + 1], T());
#pragma unroll
      for (int d = 0; d < D / 16; d++) {
        uint32_t v[4];
        load_transposed(v, (value_lane ^ (d * 32)) + n * 16 * D * 2);
#pragma unroll
        for (int f = 0; f < Frags; f++) {
          multiply(mixture[f][2 * d], w[f], v[0], v[1], T());
          multiply(mixture[f][2 * d + 1], w[f], v[2], v[3], T());
        }
      }
    }
  }
};

}  // namespace specblock

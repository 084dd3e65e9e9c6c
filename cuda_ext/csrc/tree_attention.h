// Attention of the rows of one draft tree over one key/value head, on one core.
//
// All query rows that share a key/value head (tree rows times grouped heads) go through the keys together: the prefix
// is read once for the whole tree. Keys are taken in order and a hidden key contributes exactly nothing, so a row's
// result has the same bits whatever else is in its tree or batch.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "vector.h"

namespace {

using specblock::AttentionRows;

constexpr int64_t kChunkRows = 32;  // query rows whose scores are kept at once (T * 32 floats, in the second-level cache)
constexpr int64_t kAhead = 24;      // keys between what is read and what is asked of memory
constexpr float kHidden = -3e38f;
constexpr int64_t kMixRows = L == 16 ? 6 : 3;  // rows times four vectors are most of the registers

// scores[t][n] = q_n . k_t for V vectors of query rows; queries are transposed, [D][stride].
template <int V, int B>
SB_INLINE void score_block(const float* queries, const float* key, int64_t key_row, float* scores, int64_t stride,
                           int64_t D) {
  Float sum[B][V] = {};
  for (int64_t d = 0; d < D; d++) {
    Float q[V];
    for (int v = 0; v < V; v++) q[v] = load(queries + d * stride + v * L);
    for (int b = 0; b < B; b++) {
      const auto k = broadcast(key[b * key_row + d]);
      for (int v = 0; v < V; v++) sum[b][v] += k * q[v];
    }
  }
  for (int b = 0; b < B; b++)
    for (int v = 0; v < V; v++) store(scores + b * stride + v * L, sum[b][v]);
}

template <int V>
SB_INLINE void score_rows(const float* queries, const AttentionRows& a, float* scores, int64_t stride) {
  constexpr int B = 8 / V;  // eight chains of additions: as many as begin while one of them is under way
  int64_t t = 0;
  for (; t + B <= a.T; t += B) {
    for (int b = 0; b < B; b++)  // keys come from memory: a cycle's weights have passed since they were last read
      for (int64_t d = 0; d < a.D; d += 16) __builtin_prefetch(a.key + (t + kAhead + b) * a.key_row + d);
    score_block<V, B>(queries, a.key + t * a.key_row, a.key_row, scores + t * stride, stride, a.D);
  }
  for (; t < a.T; t++)
    score_block<V, 1>(queries, a.key + t * a.key_row, a.key_row, scores + t * stride, stride, a.D);
}

// out[r][:] = sum over t of weights[t][r] * value[t][:], divided by total[r]; R rows, C vectors of the head.
template <int R, int C>
SB_INLINE void mix_block(const float* weights, int64_t stride, const float* value, int64_t value_row, int64_t T,
                         const float* total, float* const* out) {
  Float sum[R][C] = {};
  for (int64_t t = 0; t < T; t++) {
    Float v[C];
    for (int c = 0; c < C; c++) {
      __builtin_prefetch(value + (t + kAhead) * value_row + c * L);
      v[c] = load(value + t * value_row + c * L);
    }
    for (int r = 0; r < R; r++) {
      const auto w = broadcast(weights[t * stride + r]);
      for (int c = 0; c < C; c++) sum[r][c] += w * v[c];
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) store(out[r] + c * L, sum[r][c] / total[r]);
}

template <int R>
SB_INLINE void mix_rows(const float* weights, int64_t stride, const AttentionRows& a, const float* total,
                        float* const* rows) {
  float* out[R];
  int64_t d = 0;
  for (; d + 4 * L <= a.D; d += 4 * L) {
    for (int r = 0; r < R; r++) out[r] = rows[r] + d;
    mix_block<R, 4>(weights, stride, a.value + d, a.value_row, a.T, total, out);
  }
  for (; d < a.D; d += L) {
    for (int r = 0; r < R; r++) out[r] = rows[r] + d;
    mix_block<R, 1>(weights, stride, a.value + d, a.value_row, a.T, total, out);
  }
}

// Keys up to the last one that any of some query rows sees: in the chunks of a long text that is about half of them.
SB_INLINE int64_t seen_keys(const AttentionRows& a, int64_t first, int64_t count) {
  int64_t seen = 1;
  for (int64_t n = 0; n < std::min(count, a.rows) && seen < a.T; n++) {
    const bool* visible = a.mask + (first + n) % a.rows * a.mask_row;
    int64_t t = a.T;
    while (t > seen && !visible[t - 1]) t--;
    seen = t;
  }
  return seen;
}

// The query rows first .. first + count - 1 (row n is head n / rows, tree row n % rows).
SB_INLINE void attend_chunk(const AttentionRows& whole, int64_t first, int64_t count, std::vector<float>& queries,
                            std::vector<float>& scores) {
  AttentionRows a = whole;
  a.T = seen_keys(whole, first, count);
  const int64_t stride = (count + L - 1) / L * L;
  queries.assign(a.D * stride, 0.0f);
  scores.resize(a.T * stride);
  for (int64_t n = 0; n < count; n++) {
    const int64_t head = (first + n) / a.rows, row = (first + n) % a.rows;
    const float* from = a.query + head * a.query_head + row * a.query_row;
    for (int64_t d = 0; d < a.D; d++) queries[d * stride + n] = from[d] * a.scale;
  }
  int64_t lane = 0;
  for (; lane + 2 * L <= stride; lane += 2 * L) score_rows<2>(queries.data() + lane, a, scores.data() + lane, stride);
  for (; lane < stride; lane += L) score_rows<1>(queries.data() + lane, a, scores.data() + lane, stride);

  for (int64_t n = 0; n < count; n++) {
    const bool* visible = a.mask + (first + n) % a.rows * a.mask_row;
    const void* hidden = std::memchr(visible, 0, a.T);  // a prefix is seen as a whole
    for (int64_t t = hidden == nullptr ? a.T : static_cast<const bool*>(hidden) - visible; t < a.T; t++)
      if (!visible[t]) scores[t * stride + n] = kHidden;
  }
  float total[kChunkRows + 16];
  for (lane = 0; lane < stride; lane += L) {
    auto most = broadcast(kHidden);
    for (int64_t t = 0; t < a.T; t++) {
      const auto s = load(scores.data() + t * stride + lane);
      most = s > most ? s : most;
    }
    Float sum = {};
    for (int64_t t = 0; t < a.T; t++) {
      const auto w = exp_negative(load(scores.data() + t * stride + lane) - most);
      store(scores.data() + t * stride + lane, w);
      sum += w;
    }
    store(total + lane, sum);
  }
  for (int64_t n = 0; n < count;) {
    float* rows[kMixRows];
    const int64_t take = std::min<int64_t>(kMixRows, count - n);
    for (int64_t r = 0; r < take; r++)
      rows[r] = a.out + (first + n + r) / a.rows * a.out_head + (first + n + r) % a.rows * a.out_row;
    const float* weights = scores.data() + n;
    switch (take) {
      case 1: mix_rows<1>(weights, stride, a, total + n, rows); break;
      case 2: mix_rows<2>(weights, stride, a, total + n, rows); break;
      case 3: mix_rows<3>(weights, stride, a, total + n, rows); break;
#if SB_LANES == 16
      case 4: mix_rows<4>(weights, stride, a, total + n, rows); break;
      case 5: mix_rows<5>(weights, stride, a, total + n, rows); break;
      default: mix_rows<6>(weights, stride, a, total + n, rows); break;
#endif
    }
    n += take;
  }
}

SB_INLINE void attend(const AttentionRows& a) {
  std::vector<float> queries, scores;
  const int64_t all = a.heads * a.rows;
  for (int64_t first = 0; first < all; first += kChunkRows)
    attend_chunk(a, first, std::min(kChunkRows, all - first), queries, scores);
}

}  // namespace

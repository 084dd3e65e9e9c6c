// What a drafter proposes at one slot: its best tokens, ranked by the target's own noise; cuda_ext/ranking.py says what
// it must return. One pass over the vocabulary per quantity instead of a tensor per step.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "vector.h"

namespace {

using specblock::DraftRow;

// log(sum(exp(x))), sixteen partial sums whatever the vector width; `largest` is the maximum of x.
SB_INLINE float log_sum_exp(const float* x, int64_t size, float largest) {
  constexpr int C = 16 / L;
  Float sums[C] = {};
  int64_t i = 0;
  for (; i + 16 <= size; i += 16)
    for (int c = 0; c < C; c++) sums[c] += exp_negative(load(x + i + c * L) - largest);
  float lanes[16] = {}, total = 0.0f;
  for (int c = 0; c < C; c++) store(lanes + c * L, sums[c]);
  if (i < size) {
    float rest[16];
    std::fill(rest, rest + 16, -std::numeric_limits<float>::infinity());
    std::copy(x + i, x + size, rest);
    for (int c = 0; c < C; c++) {
      Float part = exp_negative(load(rest + c * L) - largest);
      float values[L];
      store(values, part);
      for (int lane = 0; lane < L; lane++) lanes[c * L + lane] += values[lane];
    }
  }
  for (float lane : lanes) total += lane;
  return largest + std::log(total);
}

// The `count` largest values, descending; of equal ones the lower index first. index may be null.
SB_INLINE void largest_values(const float* x, int64_t size, int64_t count, float* values, int64_t* index) {
  int64_t held = 0;
  for (int64_t i = 0; i < size; i++) {
    if (held == count && !(x[i] > values[count - 1])) continue;
    int64_t at = held < count ? held++ : count - 1;
    for (; at > 0 && x[i] > values[at - 1]; at--) {
      values[at] = values[at - 1];
      if (index) index[at] = index[at - 1];
    }
    values[at] = x[i];
    if (index) index[at] = i;
  }
}

// The smallest logit (after temperature) that the request's top-k, top-p and min-p surely leave.
SB_INLINE float filter_floor(const DraftRow& row, const float* top, float normaliser) {
  const float none = -std::numeric_limits<float>::infinity();
  float floor = none, mass = 0.0f, least = top[0];
  bool all = true;
  for (int64_t i = 0; i < row.num_top; i++) {
    if (row.top_p >= 1 || mass < static_cast<float>(row.top_p)) least = top[i];
    else all = false;
    mass += std::exp(top[i] - normaliser);
  }
  if (!all) floor = least;
  floor = std::max(floor, top[0] + std::log(static_cast<float>(row.min_p)));
  if (row.top_k > 0 && row.top_k <= row.num_top) floor = std::max(floor, top[row.top_k - 1]);
  return floor;
}

SB_INLINE void draft_top(const DraftRow& row) {
  largest_values(row.logits, row.size, row.num_top, row.top, nullptr);
  const float* score = row.logits;
  float largest = row.top[0];
  std::vector<float> own;
  if (row.noise != nullptr && row.temperature > 0) {
    own.resize(row.size);
    const float temperature = static_cast<float>(row.temperature), scale = static_cast<float>(row.scale);
    for (int64_t i = 0; i < row.size; i++) own[i] = row.logits[i] / temperature;
    std::vector<float> top(row.top, row.top + row.num_top);
    for (float& value : top) value /= temperature;
    const float floor = filter_floor(row, top.data(), log_sum_exp(own.data(), row.size, top[0]));
    largest = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < row.size; i++) {
      const float noise = static_cast<float>(row.noise[row.ids ? row.ids[i] : i]);
      own[i] = own[i] < floor ? -std::numeric_limits<float>::infinity() : (own[i] + noise) / scale;
      largest = std::max(largest, own[i]);
    }
    score = own.data();
  }
  largest_values(score, row.size, row.width, row.log_prob, row.token);
  const float normaliser = log_sum_exp(score, row.size, largest);
  for (int64_t i = 0; i < row.width; i++) row.log_prob[i] -= normaliser;
}

}  // namespace

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

constexpr int64_t kGlance = 64;  // values that are looked at together

// The largest of each of kGlance columns of x, as far as whole rows of columns go.
SB_INLINE void column_maxima(const float* x, int64_t size, float* maxima) {
  constexpr int C = kGlance / L;
  Float most[C];
  for (int c = 0; c < C; c++) most[c] = broadcast(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i + kGlance <= size; i += kGlance)
    for (int c = 0; c < C; c++) {
      const Float values = load(x + i + c * L);
      most[c] = values > most[c] ? values : most[c];
    }
  for (int c = 0; c < C; c++) store(maxima + c * L, most[c]);
}

// Whether any of kGlance values is not below `least`.
SB_INLINE bool any_reaches(const float* x, float least) {
  const Float bound = broadcast(least);
  auto below = load(x) < bound;
  for (int c = 1; c < kGlance / L; c++) below &= load(x + c * L) < bound;
  uint64_t words[L / 2], all = ~uint64_t{0};
  static_assert(sizeof words == sizeof below);
  std::memcpy(words, &below, sizeof below);
  for (uint64_t word : words) all &= word;
  return all != ~uint64_t{0};
}

// Puts a value into `values`, descending, of which `held` are there and `count` have room; behind its equals.
SB_INLINE void insert(float value, int64_t at, int64_t count, int64_t& held, float* values, int64_t* index) {
  if (held == count && !(value > values[count - 1])) return;
  int64_t place = held < count ? held++ : count - 1;
  for (; place > 0 && value > values[place - 1]; place--) {
    values[place] = values[place - 1];
    if (index) index[place] = index[place - 1];
  }
  values[place] = value;
  if (index) index[place] = at;
}

// The `count` largest values, descending; of equal ones the lower index first. index may be null.
// Of the columns' maxima, `count` are as large as the `count`-th largest of them, so smaller values need no look.
SB_INLINE void largest_values(const float* x, int64_t size, int64_t count, float* values, int64_t* index) {
  float maxima[kGlance], least = -std::numeric_limits<float>::infinity();
  int64_t held = 0;
  if (count <= kGlance) {
    column_maxima(x, size, maxima);
    for (int64_t i = 0; i < kGlance; i++) insert(maxima[i], i, count, held, values, nullptr);
    least = values[count - 1];
    held = 0;
  }
  for (int64_t begin = 0; begin < size; begin += kGlance) {
    const int64_t end = std::min(begin + kGlance, size);
    if (end - begin == kGlance && !any_reaches(x + begin, least)) continue;
    for (int64_t i = begin; i < end; i++)
      if (!(x[i] < least)) insert(x[i], i, count, held, values, index);
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
  std::vector<float> own;
  if (row.noise != nullptr && row.temperature > 0) {
    own.resize(row.size);
    const float temperature = static_cast<float>(row.temperature), scale = static_cast<float>(row.scale);
    for (int64_t i = 0; i < row.size; i++) own[i] = row.logits[i] / temperature;
    std::vector<float> top(row.top, row.top + row.num_top);
    for (float& value : top) value /= temperature;
    const float floor = filter_floor(row, top.data(), log_sum_exp(own.data(), row.size, top[0]));
    const auto ranked = [&](int64_t i, double noise) {
      return own[i] < floor ? -std::numeric_limits<float>::infinity() : (own[i] + static_cast<float>(noise)) / scale;
    };
    if (row.ids == nullptr) {
      for (int64_t i = 0; i < row.size; i++) own[i] = ranked(i, row.noise[i]);
    } else {
      for (int64_t i = 0; i < row.size; i++) own[i] = ranked(i, row.noise[row.ids[i]]);
    }
    score = own.data();
  }
  largest_values(score, row.size, row.width, row.log_prob, row.token);
  const float normaliser = log_sum_exp(score, row.size, row.log_prob[0]);
  for (int64_t i = 0; i < row.width; i++) row.log_prob[i] -= normaliser;
}

}  // namespace

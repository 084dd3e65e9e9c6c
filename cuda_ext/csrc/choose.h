// The target's choice at one row: arg-max of processed log-probability + Gumbel noise, without sorting the vocabulary.
//
// Tokens are tried from the best perturbed score down; the first that top-k, top-p and min-p keep is the choice.
// Whether they keep a token depends only on how much probability stands before it (larger values, then lower ids).
// That is added up in float32 first; exactly, in float64, only where float32 cannot tell.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "kernels.h"
#include "vector.h"

namespace {

using specblock::ChoiceRow;

constexpr double kNever = -std::numeric_limits<double>::infinity();
constexpr int kLanes = 16;  // partial maxima and sums

SB_INLINE double largest_of(const double* x, int64_t size) {
  double most[kLanes];
  std::fill_n(most, kLanes, kNever);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int lane = 0; lane < kLanes; lane++) most[lane] = x[i + lane] > most[lane] ? x[i + lane] : most[lane];
  for (; i < size; i++) most[0] = std::max(most[0], x[i]);
  return *std::max_element(most, most + kLanes);
}

class Choice {
 public:
  explicit Choice(const ChoiceRow& row)
      : row_(row), size_(row.size), nucleus_(row.filters.top_p < 1), top_k_(row.filters.top_k < row.size ? row.filters.top_k : 0) {}

  template <class Logit>
  int64_t of(const Logit* logits) {
    if (row_.filters.temperature == 0) {
      int64_t best = 0;  // the lowest id of equals; the first NaN, as the definition has it
      for (int64_t i = 0; i < size_ && logits[best] == logits[best]; i++)
        if (logits[i] > logits[best] || logits[i] != logits[i]) best = i;
      return best;
    }
    scaled_.resize(size_);
    int unordered = 0;
    for (int64_t i = 0; i < size_; i++) {
      scaled_[i] = static_cast<double>(logits[i]) / row_.filters.temperature;
      unordered |= scaled_[i] != scaled_[i];
    }
    if (unordered) return 0;  // as the definition, in which one NaN makes every log-probability one
    largest_ = largest_of(scaled_.data(), size_);
    const double least = row_.filters.min_p > 0 ? largest_ + std::log(row_.filters.min_p) : kNever;
    score_.resize(size_);
    for (int64_t i = 0; i < size_; i++) score_[i] = scaled_[i] < least ? kNever : scaled_[i] + row_.noise[i];
    for (;;) {
      const double most = largest_of(score_.data(), size_);
      const int64_t best = std::find(score_.begin(), score_.end(), most) - score_.begin();
      if ((!nucleus_ && top_k_ == 0) || kept(best)) return best;
      // Nothing behind this token is kept either.
      const double edge = scaled_[best];
      for (int64_t i = 0; i < size_; i++)
        if (scaled_[i] < edge || (scaled_[i] == edge && i >= best)) score_[i] = kNever;
    }
  }

 private:
  // Whether top-k and top-p keep a token.
  bool kept(int64_t token) {
    const double value = scaled_[token];
    int64_t rank = 0;
    for (int64_t i = 0; i < size_; i++) rank += scaled_[i] > value;
    for (int64_t i = 0; i < token; i++) rank += scaled_[i] == value;
    if (rank == 0) return true;
    if (top_k_ > 0 && rank >= top_k_) return false;
    if (!nucleus_) return true;
    if (top_k_ == 0) {
      const double about = mass_about(token), off = 1e-4 + static_cast<double>(size_) * 1e-8;  // far more than rounding
      if (about < row_.filters.top_p - off || about > row_.filters.top_p + off) return about < row_.filters.top_p;
    }
    return mass_before(token) < row_.filters.top_p;
  }

  // The share of what stands before a token in the probability of all, in float32.
  double mass_about(int64_t token) {
    if (part_.empty()) {
      const int64_t padded = (size_ + kLanes - 1) / kLanes * kLanes;
      part_.assign(padded, -1e3f);  // nothing
      for (int64_t i = 0; i < size_; i++) part_[i] = static_cast<float>(scaled_[i] - largest_);
      for (int64_t i = 0; i < padded; i += L) store(part_.data() + i, exp_negative(load(part_.data() + i)));
    }
    const double value = scaled_[token];
    const auto before = [&](int64_t i) { return scaled_[i] > value || (scaled_[i] == value && i < token) ? part_[i] : 0.0f; };
    float all[kLanes] = {}, some[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= size_; i += kLanes)
      for (int lane = 0; lane < kLanes; lane++) {
        all[lane] += part_[i + lane];
        some[lane] += before(i + lane);
      }
    for (; i < size_; i++) {
      all[0] += part_[i];
      some[0] += before(i);
    }
    double total = 0, share = 0;
    for (int lane = 0; lane < kLanes; lane++) {
      total += static_cast<double>(all[lane]);
      share += static_cast<double>(some[lane]);
    }
    return share / total;
  }

  double mass_before(int64_t token) {
    if (weight_.empty()) {
      weight_.resize(size_);
      for (int64_t i = 0; i < size_; i++) total_ += weight_[i] = std::exp(scaled_[i] - largest_);
      if (top_k_ > 0) total_ = within(top_k_);
    }
    double mass = 0;
    for (int64_t i = 0; i < size_; i++)
      if (scaled_[i] > scaled_[token] || (scaled_[i] == scaled_[token] && i < token)) mass += weight_[i];
    return mass / total_;
  }

  // Sum of the weights that top-k keeps.
  double within(int64_t top_k) const {
    std::vector<double> sorted = scaled_;
    std::nth_element(sorted.begin(), sorted.begin() + (top_k - 1), sorted.end(), std::greater<>());
    const double edge = sorted[top_k - 1];
    double sum = 0;
    int64_t above = 0;
    for (int64_t i = 0; i < size_; i++)
      if (scaled_[i] > edge) {
        sum += weight_[i];
        above++;
      }
    return sum + static_cast<double>(top_k - above) * std::exp(edge - largest_);
  }

  const ChoiceRow& row_;
  int64_t size_;
  bool nucleus_;
  int64_t top_k_;
  std::vector<double> scaled_, weight_, score_;
  std::vector<float> part_;
  double largest_ = 0, total_ = 0;
};

SB_INLINE int64_t choose(const ChoiceRow& row) {
  Choice choice(row);
  return row.wide != nullptr ? choice.of(row.wide) : choice.of(row.logits);
}

}  // namespace

// The target's choice at one row: arg-max of processed log-probability + Gumbel noise, without sorting the vocabulary.
//
// Tokens are tried from the best perturbed score down; the first that top-k, top-p and min-p keep is the choice.
// Whether they keep a token depends only on how much probability stands before it (larger values, then lower ids).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "choice_filters.h"

namespace specblock {

struct Standing {
  int64_t rank;  // tokens before it
  double mass;   // their share of the probability of all that top-k keeps
};

class Choice {
 public:
  template <class Logit>
  int64_t of(const Logit* logits, int64_t size, const ChoiceFilters& filters, const double* noise) {
    if (filters.temperature == 0) {
      int64_t best = 0;  // the lowest id of equals; the first NaN, as the definition has it
      for (int64_t i = 0; i < size && logits[best] == logits[best]; i++)
        if (logits[i] > logits[best] || logits[i] != logits[i]) best = i;
      return best;
    }
    scaled_.resize(size);
    weight_.resize(size);
    bool numbers = true;
    for (int64_t i = 0; i < size; i++) {
      scaled_[i] = static_cast<double>(logits[i]) / filters.temperature;
      numbers &= scaled_[i] == scaled_[i];
    }
    if (!numbers) return 0;  // as the definition, in which one NaN makes every log-probability one
    const double largest = *std::max_element(scaled_.begin(), scaled_.end());
    const bool nucleus = filters.top_p < 1;
    const int64_t top_k = filters.top_k < size ? filters.top_k : 0;
    total_ = 0;
    if (nucleus)
      for (int64_t i = 0; i < size; i++) total_ += weight_[i] = std::exp(scaled_[i] - largest);
    if (nucleus && top_k > 0) total_ = within(top_k, largest);
    const double least = filters.min_p > 0 ? largest + std::log(filters.min_p) : -kInfinity;
    score_.resize(size);
    for (int64_t i = 0; i < size; i++) score_[i] = scaled_[i] < least ? -kInfinity : scaled_[i] + noise[i];
    for (;;) {
      const int64_t best = std::max_element(score_.begin(), score_.end()) - score_.begin();
      if (!nucleus && top_k == 0) return best;
      const Standing at = standing(best, nucleus);
      if (at.rank == 0 || ((top_k == 0 || at.rank < top_k) && (!nucleus || at.mass < filters.top_p))) return best;
      // Nothing behind this token is kept either.
      const double edge = scaled_[best];
      for (int64_t i = 0; i < size; i++)
        if (scaled_[i] < edge || (scaled_[i] == edge && i >= best)) score_[i] = -kInfinity;
    }
  }

 private:
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();

  Standing standing(int64_t token, bool with_mass) const {
    Standing found{0, 0};
    const double value = scaled_[token];
    for (int64_t i = 0, size = static_cast<int64_t>(scaled_.size()); i < size; i++) {
      if (scaled_[i] > value || (scaled_[i] == value && i < token)) {
        found.rank++;
        if (with_mass) found.mass += weight_[i];
      }
    }
    if (with_mass) found.mass /= total_;
    return found;
  }

  // Sum of the weights that top-k keeps.
  double within(int64_t top_k, double largest) {
    score_ = scaled_;
    std::nth_element(score_.begin(), score_.begin() + (top_k - 1), score_.end(), std::greater<>());
    const double edge = score_[top_k - 1];
    double sum = 0;
    int64_t above = 0;
    for (size_t i = 0; i < scaled_.size(); i++)
      if (scaled_[i] > edge) {
        sum += weight_[i];
        above++;
      }
    return sum + static_cast<double>(top_k - above) * std::exp(edge - largest);
  }

  std::vector<double> scaled_, weight_, score_;
  double total_ = 0;
};

}  // namespace specblock

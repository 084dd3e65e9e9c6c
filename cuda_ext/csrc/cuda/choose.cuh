// The target's choice at one row by a team of threads; choose.h is the same on one core and says why it is right.
//
// The first pass finds the best perturbed score. Without filters, or where the most probable token has it, that is all.
// A second pass counts what stands before it. The sum over the whole vocabulary that top-p needs is taken in float32
// first, and in float64 only where the float32 one cannot tell on which side of top-p the token stands.
#pragma once

#include <climits>

#include "../choice_filters.h"
#include "keys.cuh"
#include "team.cuh"

namespace specblock {

constexpr int kNoToken = INT_MAX;

struct Peak {
  double score, largest;      // best score, largest value
  int at, largest_at, nan_at;  // the lowest index of each, and of the first that is no number
  int unused;
};

__device__ __forceinline__ Peak better(Peak a, const Peak& b) {
  if (b.score > a.score || (b.score == a.score && b.at < a.at)) {
    a.score = b.score;
    a.at = b.at;
  }
  if (b.largest > a.largest || (b.largest == a.largest && b.largest_at < a.largest_at)) {
    a.largest = b.largest;
    a.largest_at = b.largest_at;
  }
  a.nan_at = min(a.nan_at, b.nan_at);
  return a;
}

struct Before {
  double mass, total;  // of what stands before a token, and of everything
  long long rank;
};

template <class Logit>
class TeamChoice {
 public:
  __device__ TeamChoice(Team& team, const Logit* logits, int size, const ChoiceFilters& filters, const double* noise)
      : team_(team), logits_(logits), size_(size), noise_(noise), filters_(filters),
        divisor_(filters.temperature == 0 ? 1.0 : filters.temperature) {}

  __device__ int find() {
    const bool greedy = filters_.temperature == 0, nucleus = filters_.top_p < 1;
    const int64_t top_k = filters_.top_k < size_ ? filters_.top_k : 0;
    const bool whole = nucleus && top_k <= 0;  // top-p is a share of the whole vocabulary's mass
    int first = kNoToken;  // nothing stands before it
    for (bool fresh = true;; fresh = false) {
      const Peak peak = scan(greedy);
      if (fresh) {
        if (greedy) return peak.nan_at != kNoToken ? peak.nan_at : number(peak.at);
        if (peak.nan_at != kNoToken) return 0;
        largest_ = peak.largest;
        first = peak.largest_at;
        if (filters_.min_p > 0) {
          least_ = largest_ + log(filters_.min_p);
          // What min-p drops can only have hidden the best of the others where it was the best itself.
          if (peak.at != kNoToken && scaled(peak.at) < least_) continue;
        }
      }
      const int best = peak.at;
      if (best == kNoToken || best == first || (!nucleus && top_k <= 0)) return number(best);
      const double value = scaled(best);
      const Before at = before(value, best, nucleus, whole && total_ < 0);
      if (whole && total_ < 0) total_ = at.total;
      if (at.rank == 0 || ((top_k <= 0 || at.rank < top_k) && (!nucleus || within(at.mass, top_k)))) return best;
      edge_ = value;  // nothing behind this token is kept either
      edge_at_ = best;
    }
  }

 private:
  static constexpr int kBatch = sizeof(Logit) == 8 ? 4 : 8;  // loads under way per thread
  // The float32 sum is off by 1e-5 at most: an exponent of at most 88 is off by 6e-8 of itself, the rest are last bits.
  static constexpr double kDoubt = 1e-4;

  __device__ static int number(int token) { return token == kNoToken ? 0 : token; }

  __device__ __forceinline__ double divided(Logit logit) const {
    const double value = widened(logit);
    return divisor_ == 1 ? value : value / divisor_;
  }

  __device__ double scaled(int token) const { return divided(logits_[token]); }

  // Calls visit(token, value, noise) for this thread's share.
  template <bool kNoise, class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    const int64_t stride = team_.stride();
    for (int64_t from = team_.first(); from < size_; from += stride * kBatch) {
      Logit logit[kBatch];
      double noise[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; k++) {
        const int64_t i = from + k * stride;
        if (i < size_) {
          logit[k] = logits_[i];
          if constexpr (kNoise) noise[k] = noise_[i];
        }
      }
#pragma unroll
      for (int k = 0; k < kBatch; k++) {
        const int64_t i = from + k * stride;
        if (i < size_) visit(static_cast<int>(i), divided(logit[k]), kNoise ? noise[k] : 0.0);
      }
    }
  }

  // The best of what is left: not below least_, and before the edge.
  __device__ Peak scan(bool greedy) {
    const Peak none{-INFINITY, -INFINITY, kNoToken, kNoToken, kNoToken, 0};
    Peak own = none;
    const auto visit = [&](int i, double value, double noise) {
      const bool hidden = value < least_ || value < edge_ || (value == edge_ && i >= edge_at_);
      own = better(own, {hidden ? -INFINITY : value + noise, value, hidden ? kNoToken : i, i, value == value ? kNoToken : i, 0});
    };
    if (greedy) each<false>(visit);
    else each<true>(visit);
    return team_.reduce(own, none, [](const Peak& a, const Peak& b) { return better(a, b); });
  }

  __device__ Before before(double value, int token, bool with_mass, bool with_total) {
    Before own{0, 0, 0};
    each<false>([&](int i, double other, double) {
      if (other > value || (other == value && i < token)) {
        own.rank++;
        if (with_mass) own.mass += exp(other - largest_);
      }
      if (with_total) own.total += static_cast<double>(expf(static_cast<float>(other - largest_)));
    });
    return team_.reduce(own, Before{0, 0, 0}, [](const Before& a, const Before& b) {
      return Before{a.mass + b.mass, a.total + b.total, a.rank + b.rank};
    });
  }

  // Whether `mass` is less than the share top_p of what top-k keeps.
  __device__ bool within(double mass, int64_t top_k) {
    if (top_k > 0) {
      if (!exact_) total_ = total_of_best(top_k);
    } else if (!exact_) {
      const double share = mass / total_;
      if (fabs(share - filters_.top_p) > kDoubt) return share < filters_.top_p;  // a NaN goes on
      total_ = sum_above(-INFINITY, true).mass;
    }
    exact_ = true;
    return mass / total_ < filters_.top_p;
  }

  __device__ double total_of_best(int64_t top_k) {
    const auto key = team_.largest_key<decltype(key_of(Logit())), true>(size_, top_k, [&](int64_t i) { return key_of(logits_[i]); });
    const double edge = divisor_ == 1 ? static_cast<double>(value_of(key)) : static_cast<double>(value_of(key)) / divisor_;
    const Before above = sum_above(edge, false);
    return above.mass + static_cast<double>(top_k - above.rank) * exp(edge - largest_);
  }

  __device__ static auto key_of(Logit logit) {
    if constexpr (sizeof(Logit) == 8) return ordered_key(static_cast<double>(logit));
    else return ordered_key(static_cast<float>(logit));
  }

  __device__ Before sum_above(double edge, bool everything) {
    Before own{0, 0, 0};
    each<false>([&](int, double value, double) {
      if (everything || value > edge) {
        own.rank++;
        own.mass += exp(value - largest_);
      }
    });
    return team_.reduce(own, Before{0, 0, 0}, [](const Before& a, const Before& b) {
      return Before{a.mass + b.mass, 0, a.rank + b.rank};
    });
  }

  Team& team_;
  const Logit* __restrict__ logits_;
  const int size_;
  const double* __restrict__ noise_;
  const ChoiceFilters filters_;
  const double divisor_;
  double largest_ = 0, least_ = -INFINITY, edge_ = -INFINITY, total_ = -1;
  int edge_at_ = kNoToken;
  bool exact_ = false;
};

}  // namespace specblock

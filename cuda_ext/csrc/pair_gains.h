// What a token says about the one behind it, and a slot's candidates ranked by it; see cuda_ext/pair_gains.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "portable.h"

namespace specblock {

// Log-likelihood ratios of pairs: of token `before`, its known followers are tokens[starts[before] .. starts[before + 1]),
// ascending, with a gain each; whatever else follows gains rest[before].
struct PairGains {
  const int32_t *starts, *tokens;
  const float *gains, *rest;
  int64_t vocab_size;
};

SB_BOTH inline float pair_gain(const PairGains& known, int64_t before, int64_t token) {
  if (before < 0 || before >= known.vocab_size) return 0.0f;
  int32_t low = known.starts[before], high = known.starts[before + 1];
  const int32_t end = high;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (known.tokens[middle] < token) low = middle + 1;
    else high = middle;
  }
  return low < end && known.tokens[low] == token ? known.gains[low] : known.rest[before];
}

// How much a gain counts: as much as a logit where the target's noise ranks the proposals of a request.
SB_BOTH inline float pair_strength(double temperature, bool noisy, double weight, double scale) {
  return static_cast<float>(noisy && temperature > 0 ? weight / (scale * temperature) : weight);
}

constexpr float kLeastOutside = 1e-6f;  // of a slot's law outside of its candidates

// Logarithm of what is outside of the candidates that have `inside` of a slot's law.
SB_BOTH inline float log_outside(float inside) {
  const float outside = 1.0f - inside;
  return logf(outside > kLeastOutside ? outside : kLeastOutside);
}

}  // namespace specblock

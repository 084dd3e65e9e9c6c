// The uniform numbers of one position of a request, sixteen counters side by side: what philox.h defines, as vectors.
#pragma once

#include <cstdint>

#include "philox.h"
#include "vector.h"

namespace {

SB_INLINE void uniform_row(uint64_t seed, uint64_t choice, uint64_t position, double* out, int64_t size) {
  constexpr int kCounters = 16;
  int64_t token = 0;
  for (; token + 4 * kCounters <= size; token += 4 * kCounters) {
    uint32_t c[4][kCounters];
    for (int i = 0; i < kCounters; i++) {
      c[0][i] = static_cast<uint32_t>(token / 4 + i);
      c[1][i] = static_cast<uint32_t>(position);
      c[2][i] = static_cast<uint32_t>(choice);
      c[3][i] = 0;
    }
    auto key_0 = static_cast<uint32_t>(seed), key_1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; round++) {
      for (int i = 0; i < kCounters; i++) {
        const uint64_t product_0 = uint64_t{0xD2511F53} * c[0][i], product_1 = uint64_t{0xCD9E8D57} * c[2][i];
        const uint32_t above_1 = c[1][i], above_3 = c[3][i];
        c[0][i] = static_cast<uint32_t>(product_1 >> 32) ^ above_1 ^ key_0;
        c[1][i] = static_cast<uint32_t>(product_1);
        c[2][i] = static_cast<uint32_t>(product_0 >> 32) ^ above_3 ^ key_1;
        c[3][i] = static_cast<uint32_t>(product_0);
      }
      key_0 += 0x9E3779B9;
      key_1 += 0xBB67AE85;
    }
    for (int i = 0; i < kCounters; i++)
      for (int word = 0; word < 4; word++) out[token + 4 * i + word] = specblock::uniform(c[word][i]);
  }
  for (; token < size; token += 4) {
    const specblock::PhiloxWords bits = specblock::token_words(seed, choice, position, token / 4);
    for (int64_t lane = 0; lane < 4 && token + lane < size; lane++) out[token + lane] = specblock::uniform(bits.word[lane]);
  }
}

}  // namespace

// Philox4x32-10 (Salmon et al., SC 2011): the numbers of cuda_ext/noise.py, without a tensor per step.
#pragma once

#include <cstdint>

namespace specblock {

struct PhiloxWords {
  uint32_t word[4];
};

inline PhiloxWords philox4x32(PhiloxWords c, uint32_t key_0, uint32_t key_1) {
  for (int round = 0; round < 10; round++) {
    const uint64_t product_0 = uint64_t{0xD2511F53} * c.word[0], product_1 = uint64_t{0xCD9E8D57} * c.word[2];
    c = {static_cast<uint32_t>(product_1 >> 32) ^ c.word[1] ^ key_0, static_cast<uint32_t>(product_1),
         static_cast<uint32_t>(product_0 >> 32) ^ c.word[3] ^ key_1, static_cast<uint32_t>(product_0)};
    key_0 += 0x9E3779B9;
    key_1 += 0xBB67AE85;
  }
  return c;
}

// out[token] in (0, 1), the centres of 2^32 cells, for the counter (token / 4, position, choice, 0).
inline void uniform_row(uint64_t seed, uint64_t choice, uint64_t position, double* out, int64_t vocab_size) {
  for (int64_t token = 0; token < vocab_size; token += 4) {
    const PhiloxWords counter = {static_cast<uint32_t>(token / 4), static_cast<uint32_t>(position),
                                 static_cast<uint32_t>(choice), 0};
    const PhiloxWords bits =
        philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    for (int64_t lane = 0; lane < 4 && token + lane < vocab_size; lane++)
      out[token + lane] = (static_cast<double>(bits.word[lane]) + 0.5) * 0x1p-32;
  }
}

}  // namespace specblock

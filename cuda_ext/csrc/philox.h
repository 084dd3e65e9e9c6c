// Philox4x32-10 (Salmon et al., SC 2011): the numbers of cuda_ext/noise.py, without a tensor per step.
#pragma once

#include <cstdint>

#include "portable.h"

namespace specblock {

struct PhiloxWords {
  uint32_t word[4];
};

SB_BOTH inline PhiloxWords philox4x32(PhiloxWords c, uint32_t key_0, uint32_t key_1) {
  for (int round = 0; round < 10; round++) {
    const uint64_t product_0 = uint64_t{0xD2511F53} * c.word[0], product_1 = uint64_t{0xCD9E8D57} * c.word[2];
    c = {static_cast<uint32_t>(product_1 >> 32) ^ c.word[1] ^ key_0, static_cast<uint32_t>(product_1),
         static_cast<uint32_t>(product_0 >> 32) ^ c.word[3] ^ key_1, static_cast<uint32_t>(product_0)};
    key_0 += 0x9E3779B9;
    key_1 += 0xBB67AE85;
  }
  return c;
}

// The four words of tokens 4 * block .. 4 * block + 3: the counter is (block, position, choice, 0), the key the seed.
SB_BOTH inline PhiloxWords token_words(uint64_t seed, uint64_t choice, uint64_t position, int64_t block) {
  const PhiloxWords counter = {static_cast<uint32_t>(block), static_cast<uint32_t>(position), static_cast<uint32_t>(choice), 0};
  return philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// In (0, 1): the centre of one of 2^32 cells.
SB_BOTH inline double uniform(uint32_t word) { return (static_cast<double>(word) + 0.5) * 0x1p-32; }

}  // namespace specblock

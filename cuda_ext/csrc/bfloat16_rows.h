// What products of bfloat16 numbers with sums in float32 have in common: their rows, and the order of a panel's columns.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <new>

#include "kernels.h"
#include "vector.h"

namespace {

// An uninitialised buffer that starts at a cache line.
template <class T>
class Lines {
 public:
  explicit Lines(int64_t size) : data_(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t{64}))) {}
  Lines(const Lines&) = delete;
  Lines& operator=(const Lines&) = delete;
  ~Lines() { ::operator delete(data_, std::align_val_t{64}); }
  T* data() { return data_; }

 private:
  T* data_;
};

// to[part][row][depth] = the parts of x[M][K], cut off, not rounded: what is left is exact, and nothing overflows. A single
// part is rounded to the nearest. Zeros where x has no value.
template <int kParts>
SB_INLINE void split(const float* x, int64_t M, int64_t K, int64_t rows, int64_t depth, uint16_t* to) {
  for (int64_t m = 0; m < rows; m++)
    for (int64_t k = 0; k < depth; k += 16) {
      const int64_t held = m < M ? K - k : 0;
      const __mmask16 inside = held >= 16 ? 0xffff : held > 0 ? static_cast<__mmask16>((1u << held) - 1) : 0;
      __m512 left = _mm512_maskz_loadu_ps(inside, x + m * K + k);
      // Of infinities and NaN the leading part says everything; a bit that is not cut off keeps a NaN one.
      const __mmask16 odd = _mm512_fpclass_ps_mask(left, 0x99), nan = _mm512_fpclass_ps_mask(left, 0x81);
      for (int part = 0; part < kParts; part++) {
        const __m512i bits = _mm512_castps_si512(left);
        __m512i high = _mm512_srli_epi32(bits, 16);
        if constexpr (kParts == 1) {
          const __m512i half = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(high, _mm512_set1_epi32(1)));
          high = _mm512_mask_srli_epi32(high, static_cast<__mmask16>(~nan), _mm512_add_epi32(bits, half), 16);
        }
        const __m512i kept = part == 0 ? _mm512_mask_or_epi32(high, nan, high, _mm512_set1_epi32(0x40)) : high;
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + (part * rows + m) * depth + k), _mm512_cvtepi32_epi16(kept));
        left = _mm512_sub_ps(left, _mm512_castsi512_ps(_mm512_slli_epi32(high, 16)));
        left = _mm512_mask_mov_ps(left, odd, _mm512_setzero_ps());
      }
    }
}

// Takes two rows of a panel, one behind the other, to pairs of neighbouring inputs of one column.
SB_INLINE __m512i pairing() {
  alignas(64) uint16_t pairs[32];
  for (int i = 0; i < 32; i++) pairs[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
  return _mm512_load_si512(pairs);
}

// Columns j and j + 8 of a bfloat16 panel are neighbours; takes sums back into their order.
SB_INLINE __m512i column_order() {
  alignas(64) int32_t columns[16];
  for (int i = 0; i < 16; i++) columns[i] = i < 8 ? 2 * i : 2 * (i - 8) + 1;
  return _mm512_load_si512(columns);
}

}  // namespace

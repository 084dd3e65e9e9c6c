// The kernels' face: one table of functions per instruction set, and the choice between them.
#pragma once

#include <cstdint>

#include "choice_filters.h"

namespace specblock {

constexpr int64_t kPanel = 16;  // output columns per panel of a packed weight

// What one call of attend() works on: rows r = 0 .. num_rows-1 of `heads` query heads over one key/value head.
struct AttentionRows {
  const float* query;   // [heads][rows][D] at the strides below
  int64_t query_head, query_row;
  const float* key;     // [T][D]
  int64_t key_row;
  const float* value;   // [T][D]
  int64_t value_row;
  const bool* mask;     // [rows][T]
  int64_t mask_row;
  float* out;           // [rows][heads][D] at the strides below
  int64_t out_row, out_head;
  int64_t heads, rows, T, D;
  float scale;
};

// What one call of draft_top() works on: the logits of one slot.
struct DraftRow {
  const float* logits;  // [size]
  const double* noise;  // [at least size], or null: rank by the logits alone
  const int64_t* ids;   // [size], where in `noise` each logit's token is; null: at its own index
  int64_t size;
  double temperature, top_p, min_p, scale;
  int64_t top_k;
  int64_t* token;       // [width], indices of the best
  float* log_prob;      // [width]
  int64_t width;
  float* top;           // [num_top], the largest logits
  int64_t num_top;
};

// What one call of choose() works on: the target's logits of one row, either in float32 or in float64.
struct ChoiceRow {
  const float* logits;   // [size], or null
  const double* wide;    // [size], or null
  int64_t size;
  ChoiceFilters filters;
  const double* noise;   // [size]
};

struct Kernels {
  // out[M, N] = x[M, K] times the panels begin .. end of a packed weight; see panel_matmul.h. `coarse` allows x to be
  // rounded to bfloat16 where that is faster.
  void (*multiply_half)(const float* x, const uint16_t* packed, float* out, int64_t M, int64_t K, int64_t N,
                        int64_t begin, int64_t end, bool coarse);
  void (*multiply_float)(const float* x, const float* packed, float* out, int64_t M, int64_t K, int64_t N,
                         int64_t begin, int64_t end);
  void (*attend)(const AttentionRows& rows);
  void (*normalise)(const float* x, const float* weight, float* out, int64_t rows, int64_t size, float eps);
  void (*draft_top)(const DraftRow& row);
  void (*gate)(float* gate, const float* up, int64_t size);
  int64_t (*choose)(const ChoiceRow& row);
  void (*uniform_row)(uint64_t seed, uint64_t choice, uint64_t position, double* out, int64_t size);  // see philox.h
};

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Bf16;
extern const Kernels kAmx;
bool has_bfloat16_products();
bool has_matrix_unit();  // asks the system for it
#endif

inline const Kernels& widest_kernels() {
#if defined(__x86_64__)
  if (has_matrix_unit()) return kAmx;
  if (has_bfloat16_products()) return kAvx512Bf16;
  if (__builtin_cpu_supports("avx512f")) return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kBaseline;
}

// The widest kernels that this processor runs.
inline const Kernels& kernels() {
  static const Kernels& widest = widest_kernels();
  return widest;
}

}  // namespace specblock

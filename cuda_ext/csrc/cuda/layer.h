// The kernels between the products of a decoder layer, as the binding calls them: device pointers, rows contiguous and
// aligned to 16 bytes. Each launcher returns the message of a failed launch, or null.
#pragma once

#include <cstdint>

namespace specblock {

enum class FloatType : int { kFloat, kBfloat16, kHalf };

// Longest row, in vectors of 16 bytes, whose norm a block keeps in its registers.
constexpr int kNormThreads = 1024, kNormHeld = 4;
constexpr int64_t kNormVectors = int64_t{kNormThreads} * kNormHeld;

// Norm of the rows of x, or of x + residual, which is then left in `sum`.
struct NormInputs {
  const void *x, *residual;  // [rows][size]; no residual: null
  const void* weight;        // [size]
  void *sum, *out;           // [rows][size]
  int64_t rows, size;
  float eps;
  FloatType type;
};

// One product of all heads into rotated queries, and keys and values in the cache. Without the latter, G = 0.
struct RotaryInputs {
  const void* qkv;               // [B][R][H + 2 G][D]
  const void *cos, *sin;         // [B][R][D], in the type of qkv or, if the tables are wide, in float32
  const void *q_norm, *k_norm;   // [D] or null
  void *keys, *values;           // [slots][G][capacity][D] with strides, contiguous in D
  const int64_t *slot, *position;  // [B], [B][R]
  void* out;                     // [B][R][H][D]
  int64_t key_slot, key_head, key_row, value_slot, value_head, value_row;
  int64_t slots, capacity;
  int64_t B, R;
  int H, G, D;
  float eps;
  FloatType type;
  bool wide_tables;
};

// silu(gate) * up.
struct GatedInputs {
  const void *gate, *up;  // [rows][size], so many elements from row to row
  int64_t gate_row, up_row;
  void* out;  // [rows][size]
  int64_t rows, size;
  FloatType type;
};

const char* launch_norm(const NormInputs& inputs, void* stream);
const char* launch_rotary(const RotaryInputs& inputs, void* stream);
const char* launch_gated(const GatedInputs& inputs, void* stream);

}  // namespace specblock

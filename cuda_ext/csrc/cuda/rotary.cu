// From one product of all heads to rotated queries, and rotated keys and values where the cache wants them.
//
// Some neighbouring lanes share a head: each holds a vector of its lower half and the one of the upper half that is rotated
// with it. Rows for a slot or position outside of the cache are not written.
#include "launch.h"
#include "vector16.cuh"

namespace specblock {
namespace {

constexpr int kThreads = 128;

// The head's vectors, times 1 / rms(head) and the weight; rounded as transformers does.
template <class T>
__device__ void normalise(Vector16<T>& low, Vector16<T>& high, const T* weight, float scale, int half, int column) {
  Vector16<T> low_weight, high_weight;
  low_weight.load(weight + column);
  high_weight.load(weight + half + column);
#pragma unroll
  for (int i = 0; i < Vector16<T>::kSize; i++) {
    low.set(i, rounded<T>(low[i] * scale) * low_weight[i]);
    high.set(i, rounded<T>(high[i] * scale) * high_weight[i]);
  }
}

// Each product is rounded to the type of the tables, then their sum, and nothing is fused: the bits of separate operations.
template <class T, class Table>
__device__ void turn(Vector16<T>& low, Vector16<T>& high, const Table* cos, const Table* sin, int half) {
  constexpr int kWidth = Vector16<Table>::kSize;
#pragma unroll
  for (int first = 0; first < Vector16<T>::kSize; first += kWidth) {
    Vector16<Table> low_cos, low_sin, high_cos, high_sin;
    low_cos.load(cos + first), high_cos.load(cos + half + first);
    low_sin.load(sin + first), high_sin.load(sin + half + first);
#pragma unroll
    for (int i = 0; i < kWidth; i++) {
      const float x = low[first + i], y = high[first + i];
      low.set(first + i, __fadd_rn(rounded<Table>(__fmul_rn(x, low_cos[i])), rounded<Table>(__fmul_rn(-y, low_sin[i]))));
      high.set(first + i, __fadd_rn(rounded<Table>(__fmul_rn(y, high_cos[i])), rounded<Table>(__fmul_rn(x, high_sin[i]))));
    }
  }
}

template <class T, class Table>
__global__ void __launch_bounds__(kThreads) rotary_kernel(const RotaryInputs a, int lanes, int64_t all) {
  constexpr int kWidth = Vector16<T>::kSize;
  const int half = a.D / 2, heads = a.H + 2 * a.G;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t at = index < all ? index : all - 1;  // every lane takes part in the sums
  const int column = static_cast<int>(at % lanes) * kWidth;
  const int head = static_cast<int>(at / lanes % heads);
  const int64_t row = at / lanes / heads;
  const bool is_query = head < a.H, is_value = head >= a.H + a.G;
  const T* from = static_cast<const T*>(a.qkv) + (row * heads + head) * a.D + column;
  Vector16<T> low, high;
  low.load(from), high.load(from + half);
  if (a.q_norm != nullptr || a.k_norm != nullptr) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kWidth; i++) squares += low[i] * low[i] + high[i] * high[i];
    for (int step = lanes / 2; step > 0; step /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, step);
    const float scale = rsqrtf(squares / static_cast<float>(a.D) + a.eps);
    const auto* weight = static_cast<const T*>(is_query ? a.q_norm : a.k_norm);
    if (!is_value && weight != nullptr) normalise(low, high, weight, scale, half, column);
  }
  if (!is_value) {
    const int64_t place = row * a.D + column;
    turn(low, high, static_cast<const Table*>(a.cos) + place, static_cast<const Table*>(a.sin) + place, half);
  }
  T* to = static_cast<T*>(a.out) + (row * a.H + head) * a.D;
  bool fits = index < all;
  if (!is_query) {
    const int64_t slot = a.slot[row / a.R], position = a.position[row];
    fits = fits && slot >= 0 && slot < a.slots && position >= 0 && position < a.capacity;
    to = is_value ? static_cast<T*>(a.values) + slot * a.value_slot + (head - a.H - a.G) * a.value_head + position * a.value_row
                  : static_cast<T*>(a.keys) + slot * a.key_slot + (head - a.H) * a.key_head + position * a.key_row;
  }
  if (!fits) return;
  low.store(to + column);
  high.store(to + half + column);
}

template <class T>
const char* launch(const RotaryInputs& a, void* stream) {
  const int lanes = a.D / 2 / Vector16<T>::kSize;
  if (lanes < 1 || lanes > 32 || (lanes & (lanes - 1)) != 0) return "heads of this size are not served";
  const int64_t all = a.B * a.R * (a.H + 2 * a.G) * lanes;
  const auto blocks = static_cast<unsigned>((all + kThreads - 1) / kThreads);
  if (a.wide_tables) {
    rotary_kernel<T, float><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a, lanes, all);
  } else {
    rotary_kernel<T, T><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a, lanes, all);
  }
  return launch_error();
}

}  // namespace

const char* launch_rotary(const RotaryInputs& inputs, void* stream) {
  if (inputs.B * inputs.R == 0) return nullptr;
  return of_type(inputs.type, [&](auto value) { return launch<decltype(value)>(inputs, stream); });
}

}  // namespace specblock

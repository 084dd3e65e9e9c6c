// silu(gate) * up, a vector of 16 bytes per thread.
#include "launch.h"
#include "vector16.cuh"

namespace specblock {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) gated_kernel(const GatedInputs a) {
  constexpr int kWidth = Vector16<T>::kSize;
  const int64_t vectors = a.size / kWidth;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= a.rows * vectors) return;
  const int64_t row = index / vectors, column = index % vectors * kWidth;
  Vector16<T> gate, up;
  gate.load(static_cast<const T*>(a.gate) + row * a.gate_row + column);
  up.load(static_cast<const T*>(a.up) + row * a.up_row + column);
#pragma unroll
  for (int i = 0; i < kWidth; i++) gate.set(i, rounded<T>(gate[i] / (1.0f + expf(-gate[i]))) * up[i]);
  gate.store(static_cast<T*>(a.out) + row * a.size + column);
}

template <class T>
const char* launch(const GatedInputs& a, void* stream) {
  const int64_t all = a.rows * (a.size / Vector16<T>::kSize);
  gated_kernel<T><<<static_cast<unsigned>((all + kThreads - 1) / kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return launch_error();
}

}  // namespace

const char* launch_gated(const GatedInputs& inputs, void* stream) {
  if (inputs.rows * inputs.size == 0) return nullptr;
  return of_type(inputs.type, [&](auto value) { return launch<decltype(value)>(inputs, stream); });
}

}  // namespace specblock

// Products with packed weights on raw rows: what every operation that contains one is made of.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "kernels.h"

namespace specblock {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMultiplyAddsPerThread = 1 << 16;  // less is not worth waking a thread for

inline void check_packed(const Tensor& packed, int64_t inputs, int64_t outputs) {
  STD_TORCH_CHECK(packed.is_cpu() && packed.is_contiguous() && packed.dim() == 3, "packed must be contiguous [panels, K, 16] on the CPU");
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::BFloat16 || packed.scalar_type() == ScalarType::Float,
                  "packed must be bfloat16 or float32");
  STD_TORCH_CHECK(inputs > 0 && packed.size(1) == inputs && packed.size(2) == kPanel, "packed does not fit x");
  STD_TORCH_CHECK(outputs > (packed.size(0) - 1) * kPanel && outputs <= packed.size(0) * kPanel, "out_features does not fit packed");
}

// out[rows, outputs] = x[rows, K] times a packed weight that was checked; `coarse`: see kernels.h.
inline void multiply(const float* x, int64_t rows, const Tensor& packed, float* out, int64_t outputs, bool coarse) {
  if (rows == 0) return;
  const int64_t inputs = packed.size(1), grain = kMultiplyAddsPerThread / (rows * inputs * kPanel) + 1;
  const bool narrow = packed.scalar_type() == ScalarType::BFloat16;
  const void* weights = packed.const_data_ptr();
  torch::stable::parallel_for(0, packed.size(0), grain, [&](int64_t begin, int64_t end) {
    if (narrow)
      kernels().multiply_half(x, static_cast<const uint16_t*>(weights), out, rows, inputs, outputs, begin, end, coarse);
    else
      kernels().multiply_float(x, static_cast<const float*>(weights), out, rows, inputs, outputs, begin, end);
  });
}

// gate[i] = silu(gate[i]) * up[i].
inline void gate_with(float* gate, const float* up, int64_t count) {
  torch::stable::parallel_for(0, count, kMultiplyAddsPerThread,
                              [&](int64_t begin, int64_t end) { kernels().gate(gate + begin, up + begin, end - begin); });
}

}  // namespace specblock

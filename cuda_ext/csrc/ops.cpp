// Registers the native operations with PyTorch through its stable interface: one binary for every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "panel_matmul.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kMultiplyAddsPerThread = 1 << 16;  // less is not worth waking a thread for

// x [M, K] float32, packed [panels, K, 16] bfloat16 or float32 -> [M, out_features] float32.
Tensor packed_linear(const Tensor& x, const Tensor& packed, int64_t out_features) {
  STD_TORCH_CHECK(x.is_cpu() && packed.is_cpu(), "packed_linear: tensors must be on the CPU");
  STD_TORCH_CHECK(x.dim() == 2 && packed.dim() == 3, "packed_linear: expected x [M, K] and packed [panels, K, 16]");
  STD_TORCH_CHECK(x.is_contiguous() && packed.is_contiguous(), "packed_linear: tensors must be contiguous");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "packed_linear: x must be float32");
  const bool narrow = packed.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(narrow || packed.scalar_type() == ScalarType::Float, "packed_linear: packed must be bfloat16 or float32");
  const int64_t M = x.size(0), K = x.size(1), panels = packed.size(0);
  STD_TORCH_CHECK(packed.size(1) == K && packed.size(2) == specblock::kPanel, "packed_linear: packed does not fit x");
  STD_TORCH_CHECK(out_features > (panels - 1) * specblock::kPanel && out_features <= panels * specblock::kPanel,
                  "packed_linear: out_features does not fit packed");
  Tensor out = torch::stable::empty({M, out_features}, ScalarType::Float);
  if (M == 0) return out;
  const auto* rows = static_cast<const float*>(x.const_data_ptr());
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  const void* weights = packed.const_data_ptr();
  const int64_t grain = kMultiplyAddsPerThread / (M * K * specblock::kPanel) + 1;
  torch::stable::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
    if (narrow)
      specblock::multiply_any(rows, static_cast<const uint16_t*>(weights), to, M, K, out_features, begin, end);
    else
      specblock::multiply_any(rows, static_cast<const float*>(weights), to, M, K, out_features, begin, end);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(specblock, m) {
  m.def("packed_linear(Tensor x, Tensor packed, int out_features) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(specblock, CPU, m) {
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
}

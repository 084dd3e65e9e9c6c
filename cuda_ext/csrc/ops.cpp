// Registers the native operations with PyTorch through its stable interface: one binary for every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "kernels.h"
#include "products.h"
#include "rotary.h"

namespace {

using namespace specblock;

// x [..., K] float32, packed [panels, K, 16] bfloat16 or float32 -> [..., out_features] float32.
Tensor packed_linear(const Tensor& x, const Tensor& packed, int64_t out_features, bool coarse) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1 && x.is_contiguous(), "packed_linear: x must be contiguous [..., K] on the CPU");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "packed_linear: x must be float32");
  const int64_t K = x.size(x.dim() - 1);
  STD_TORCH_CHECK(K > 0, "packed_linear: there are no inputs");
  check_packed(packed, K, out_features);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  Tensor out = torch::stable::empty(shape, ScalarType::Float);
  specblock::multiply(static_cast<const float*>(x.const_data_ptr()), x.numel() / K, packed,
                      static_cast<float*>(out.mutable_data_ptr()), out_features, coarse);
  return out;
}

// silu(x times gate) * (x times up), times down: [..., K] -> [..., out_features].
Tensor swiglu(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down, int64_t inner, int64_t out_features,
              bool coarse) {
  Tensor middle = packed_linear(x, gate, inner, coarse);
  const Tensor other = packed_linear(x, up, inner, coarse);
  specblock::gate_with(static_cast<float*>(middle.mutable_data_ptr()), static_cast<const float*>(other.const_data_ptr()),
                       middle.numel());
  return packed_linear(middle, down, out_features, coarse);
}

// x times packed, every head of `head_dim` outputs normalised (with a norm) and rotated by cos and sin float32 [M, head_dim]
// in the half-split layout: [..., K] -> [..., out_features].
Tensor rotary_linear(const Tensor& x, const Tensor& packed, int64_t out_features, const Tensor& cos, const Tensor& sin,
                     std::optional<Tensor> norm, double eps, bool coarse) {
  Tensor out = packed_linear(x, packed, out_features, coarse);
  const int64_t D = cos.dim() == 2 ? cos.size(1) : 0, M = out_features > 0 ? out.numel() / out_features : 0;
  STD_TORCH_CHECK(D > 0 && D % 2 == 0 && out_features % D == 0, "rotary_linear: heads do not fit the outputs");
  for (const Tensor* t : {&cos, &sin})
    STD_TORCH_CHECK(t->is_cpu() && t->is_contiguous() && t->dim() == 2 && t->size(0) == M && t->size(1) == D &&
                        t->scalar_type() == ScalarType::Float,
                    "rotary_linear: cos and sin must be float32 [rows, head size]");
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  if (norm) {
    STD_TORCH_CHECK(norm->is_cpu() && norm->is_contiguous() && norm->dim() == 1 && norm->size(0) == D &&
                        norm->scalar_type() == ScalarType::Float,
                    "rotary_linear: the norm must be float32 [head size]");
    specblock::kernels().normalise(to, static_cast<const float*>(norm->const_data_ptr()), to, out.numel() / D, D,
                                   static_cast<float>(eps));
  }
  const auto* cosine = static_cast<const float*>(cos.const_data_ptr());
  const auto* sine = static_cast<const float*>(sin.const_data_ptr());
  for (int64_t m = 0; m < M; m++)
    for (int64_t head = 0; head < out_features / D; head++)
      specblock::rotate(to + m * out_features + head * D, cosine + m * D, sine + m * D, D);
  return out;
}

// query [B, H, R, D], key and value [B, G, T, D] (any strides but the last), mask [B, R, T] bool -> [B, R, H, D].
Tensor tree_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& mask, double scale) {
  for (const Tensor* t : {&query, &key, &value}) {
    STD_TORCH_CHECK(t->is_cpu() && t->dim() == 4, "tree_attention: expected four dimensions on the CPU");
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, "tree_attention: query, key and value must be float32");
    STD_TORCH_CHECK(t->stride(3) == 1, "tree_attention: heads must be contiguous");
  }
  STD_TORCH_CHECK(mask.is_cpu() && mask.dim() == 3 && mask.scalar_type() == ScalarType::Bool,
                  "tree_attention: mask must be bool [B, R, T] on the CPU");
  const int64_t B = query.size(0), H = query.size(1), R = query.size(2), D = query.size(3);
  const int64_t G = key.size(1), T = key.size(2);
  STD_TORCH_CHECK(D > 0 && D % 16 == 0, "tree_attention: head size must be a multiple of 16");
  STD_TORCH_CHECK(key.size(0) == B && key.size(3) == D && G > 0 && H > 0 && H % G == 0, "tree_attention: key does not fit query");
  STD_TORCH_CHECK(value.size(0) == B && value.size(1) == G && value.size(2) == T && value.size(3) == D,
                  "tree_attention: value does not fit key");
  STD_TORCH_CHECK(mask.size(0) == B && mask.size(1) == R && mask.size(2) == T && T > 0, "tree_attention: mask does not fit");
  STD_TORCH_CHECK(mask.stride(2) == 1 || T == 1, "tree_attention: mask rows must be contiguous");
  Tensor out = torch::stable::empty({B, R, H, D}, ScalarType::Float);
  if (B * R == 0) return out;
  const auto* q = static_cast<const float*>(query.const_data_ptr());
  const auto* k = static_cast<const float*>(key.const_data_ptr());
  const auto* v = static_cast<const float*>(value.const_data_ptr());
  const auto* m = static_cast<const bool*>(mask.const_data_ptr());
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  const int64_t groups = H / G, grain = kMultiplyAddsPerThread / (2 * groups * R * T * D) + 1;
  const int64_t q0 = query.stride(0), q1 = query.stride(1), q2 = query.stride(2);
  const int64_t k0 = key.stride(0), k1 = key.stride(1), k2 = key.stride(2);
  const int64_t v0 = value.stride(0), v1 = value.stride(1), v2 = value.stride(2);
  const int64_t m0 = mask.stride(0), m1 = mask.stride(1);
  torch::stable::parallel_for(0, B * G, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / G, g = i % G;
      specblock::kernels().attend({
          .query = q + b * q0 + g * groups * q1, .query_head = q1, .query_row = q2,
          .key = k + b * k0 + g * k1, .key_row = k2,
          .value = v + b * v0 + g * v1, .value_row = v2,
          .mask = m + b * m0, .mask_row = m1,
          .out = to + b * R * H * D + g * groups * D, .out_row = H * D, .out_head = D,
          .heads = groups, .rows = R, .T = T, .D = D, .scale = static_cast<float>(scale),
      });
    }
  });
  return out;
}

// x [..., K] float32, weight [K] float32 -> [..., K].
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  STD_TORCH_CHECK(x.is_cpu() && weight.is_cpu() && x.dim() >= 1 && weight.dim() == 1, "rms_norm: expected x [..., K], weight [K]");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && weight.scalar_type() == ScalarType::Float,
                  "rms_norm: tensors must be float32");
  const int64_t K = x.size(x.dim() - 1);
  STD_TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && K > 0 && weight.size(0) == K,
                  "rms_norm: tensors must be contiguous and fit");
  Tensor out = torch::stable::empty(x.sizes(), ScalarType::Float);
  specblock::kernels().normalise(static_cast<const float*>(x.const_data_ptr()), static_cast<const float*>(weight.const_data_ptr()),
                           static_cast<float*>(out.mutable_data_ptr()), x.numel() / K, K, static_cast<float>(eps));
  return out;
}

// seed, choice, position int64 [N] -> float64 [N, vocab_size] in (0, 1).
Tensor philox_uniform(const Tensor& seed, const Tensor& choice, const Tensor& position, int64_t vocab_size) {
  for (const Tensor* t : {&seed, &choice, &position}) {
    STD_TORCH_CHECK(t->is_cpu() && t->dim() == 1 && t->scalar_type() == ScalarType::Long && t->is_contiguous(),
                    "philox_uniform: expected contiguous int64 vectors on the CPU");
    STD_TORCH_CHECK(t->size(0) == seed.size(0), "philox_uniform: vectors must be of one length");
  }
  STD_TORCH_CHECK(vocab_size > 0, "philox_uniform: vocab_size must be positive");
  const int64_t N = seed.size(0);
  Tensor out = torch::stable::empty({N, vocab_size}, ScalarType::Double);
  const auto* seeds = static_cast<const int64_t*>(seed.const_data_ptr());
  const auto* choices = static_cast<const int64_t*>(choice.const_data_ptr());
  const auto* positions = static_cast<const int64_t*>(position.const_data_ptr());
  auto* to = static_cast<double*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, N, kMultiplyAddsPerThread / (16 * vocab_size) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++)
      specblock::kernels().uniform_row(seeds[n], choices[n], positions[n], to + n * vocab_size, vocab_size);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(specblock, m) {
  m.def("packed_linear(Tensor x, Tensor packed, int out_features, bool coarse=False) -> Tensor");
  m.def("tree_attention(Tensor query, Tensor key, Tensor value, Tensor mask, float scale) -> Tensor");
  m.def("philox_uniform(Tensor seed, Tensor choice, Tensor position, int vocab_size) -> Tensor");
  m.def("swiglu(Tensor x, Tensor gate, Tensor up, Tensor down, int inner, int out_features, bool coarse=False) -> Tensor");
  m.def("rotary_linear(Tensor x, Tensor packed, int out_features, Tensor cos, Tensor sin, Tensor? norm, float eps, "
        "bool coarse=False) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(specblock, CPU, m) {
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
  m.impl("tree_attention", TORCH_BOX(&tree_attention));
  m.impl("philox_uniform", TORCH_BOX(&philox_uniform));
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("rotary_linear", TORCH_BOX(&rotary_linear));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
}

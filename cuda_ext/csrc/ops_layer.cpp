// Registers the two halves of a decoder layer, before and after its attention: a cycle calls them a dozen times over
// a few rows, and what a call costs by itself would be as much as the work.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "layer_parts.h"

namespace {

using namespace specblock;

// x float32 [B, T, K], cos and sin [B or 1, T, D] -> query [B, T, query_out], key and value [B, T, key_out].
std::tuple<Tensor, Tensor, Tensor> attention_inputs(const Tensor& x, const Tensor& norm, double eps, const Tensor& query,
                                                    const Tensor& key, const Tensor& value, int64_t query_out,
                                                    int64_t key_out, const Tensor& cos, const Tensor& sin,
                                                    std::optional<Tensor> query_norm, std::optional<Tensor> key_norm,
                                                    double head_eps, bool coarse) {
  check(x, ScalarType::Float, 3, "x");
  const int64_t B = x.size(0), T = x.size(1), K = x.size(2), rows = B * T;
  check_packed(query, K, query_out);
  check_packed(key, K, key_out);
  check_packed(value, K, key_out);
  check_tables(cos, sin, B, T, query_out, key_out);
  const int64_t D = cos.size(2);
  std::vector<float> normed(rows * K);
  kernels().normalise(read<float>(x), norm_of(norm, K), normed.data(), rows, K, static_cast<float>(eps));
  Tensor q = torch::stable::empty({B, T, query_out}, ScalarType::Float);
  Tensor k = torch::stable::empty({B, T, key_out}, ScalarType::Float);
  Tensor v = torch::stable::empty({B, T, key_out}, ScalarType::Float);
  multiply(normed.data(), rows, query, write<float>(q), query_out, coarse);
  multiply(normed.data(), rows, key, write<float>(k), key_out, coarse);
  multiply(normed.data(), rows, value, write<float>(v), key_out, coarse);
  const float *cosine = read<float>(cos), *sine = read<float>(sin);
  const std::vector<int64_t> place = table_rows(cos, rows);
  turn(write<float>(q), rows, query_out, D, query_norm ? norm_of(*query_norm, D) : nullptr, static_cast<float>(head_eps),
       cosine, sine, place);
  turn(write<float>(k), rows, key_out, D, key_norm ? norm_of(*key_norm, D) : nullptr, static_cast<float>(head_eps), cosine,
       sine, place);
  return {q, k, v};
}

// r = x + mixed times output; r + swiglu(norm(r)): float32 [..., K] from x [..., K] and mixed [..., inputs].
Tensor layer_rest(const Tensor& x, const Tensor& mixed, const Tensor& output, const Tensor& norm, double eps,
                  const Tensor& gate, const Tensor& up, const Tensor& down, int64_t inner, bool coarse) {
  STD_TORCH_CHECK(x.dim() >= 1 && mixed.dim() >= 1, "layer_rest: x and mixed must have rows");
  check(x, ScalarType::Float, x.dim(), "x");
  check(mixed, ScalarType::Float, mixed.dim(), "mixed");
  const int64_t K = x.size(x.dim() - 1), inputs = mixed.size(mixed.dim() - 1), rows = K > 0 ? x.numel() / K : 0;
  STD_TORCH_CHECK(inputs > 0 && mixed.numel() == rows * inputs, "layer_rest: mixed does not fit x");
  Tensor out = torch::stable::empty(x.sizes(), ScalarType::Float);
  const Rest rest(output, norm, eps, gate, up, down, inner, inputs, K, coarse);
  rest(read<float>(x), read<float>(mixed), rows, write<float>(out));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specblock, m) {
  m.def("attention_inputs(Tensor x, Tensor norm, float eps, Tensor query, Tensor key, Tensor value, int query_out, "
        "int key_out, Tensor cos, Tensor sin, Tensor? query_norm, Tensor? key_norm, float head_eps, "
        "bool coarse=False) -> (Tensor, Tensor, Tensor)");
  m.def("layer_rest(Tensor x, Tensor mixed, Tensor output, Tensor norm, float eps, Tensor gate, Tensor up, Tensor down, "
        "int inner, bool coarse=False) -> Tensor");
  // Between the products of a layer on CUDA devices: see ops_cuda_layer.cpp.
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("rotary_store(Tensor qkv, Tensor cos, Tensor sin, Tensor? q_norm, Tensor? k_norm, float eps, Tensor(a!) keys, "
        "Tensor(b!) values, Tensor slots, Tensor positions) -> Tensor");
  m.def("rotary_heads(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  m.def("gated(Tensor gate, Tensor up) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(specblock, CPU, m) {
  m.impl("attention_inputs", TORCH_BOX(&attention_inputs));
  m.impl("layer_rest", TORCH_BOX(&layer_rest));
}

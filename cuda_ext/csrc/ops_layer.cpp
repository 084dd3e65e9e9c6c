// Registers the two halves of a decoder layer, before and after its attention: a cycle calls them a dozen times over
// a few rows, and what a call costs by itself would be as much as the work.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "kernels.h"
#include "products.h"
#include "rotary.h"

namespace {

using namespace specblock;

const float* norm_of(const Tensor& norm, int64_t size) {
  check(norm, ScalarType::Float, 1, "norm");
  STD_TORCH_CHECK(norm.size(0) == size, "the norm does not fit the rows");
  return read<float>(norm);
}

// Heads of `size` in rows [B * T, outputs], normalised (with a norm) and rotated by rows of tables [B or 1, T, size].
void turn(float* rows, int64_t count, int64_t outputs, int64_t size, const float* norm, float eps, const float* cosine,
          const float* sine, int64_t table_rows) {
  if (norm != nullptr) kernels().normalise(rows, norm, rows, count * (outputs / size), size, eps);
  for (int64_t row = 0; row < count; row++) {
    const int64_t at = row % table_rows * size;
    for (int64_t head = 0; head < outputs / size; head++)
      rotate(rows + row * outputs + head * size, cosine + at, sine + at, size);
  }
}

// x float32 [B, T, K], cos and sin [B or 1, T, D] -> query [B, T, query_out], key and value [B, T, key_out].
std::tuple<Tensor, Tensor, Tensor> attention_inputs(const Tensor& x, const Tensor& norm, double eps, const Tensor& query,
                                                    const Tensor& key, const Tensor& value, int64_t query_out,
                                                    int64_t key_out, const Tensor& cos, const Tensor& sin,
                                                    std::optional<Tensor> query_norm, std::optional<Tensor> key_norm,
                                                    double head_eps) {
  check(x, ScalarType::Float, 3, "x");
  const int64_t B = x.size(0), T = x.size(1), K = x.size(2), rows = B * T;
  check_packed(query, K, query_out);
  check_packed(key, K, key_out);
  check_packed(value, K, key_out);
  check(cos, ScalarType::Float, 3, "cos");
  check(sin, ScalarType::Float, 3, "sin");
  const int64_t D = cos.size(2);
  for (const Tensor* t : {&cos, &sin})
    STD_TORCH_CHECK((t->size(0) == B || t->size(0) == 1) && t->size(0) == cos.size(0) && t->size(1) == T && t->size(2) == D,
                    "attention_inputs: cos and sin do not fit x");
  STD_TORCH_CHECK(D > 0 && D % 2 == 0 && query_out % D == 0 && key_out % D == 0, "attention_inputs: heads do not fit");
  std::vector<float> normed(rows * K);
  kernels().normalise(read<float>(x), norm_of(norm, K), normed.data(), rows, K, static_cast<float>(eps));
  Tensor q = torch::stable::empty({B, T, query_out}, ScalarType::Float);
  Tensor k = torch::stable::empty({B, T, key_out}, ScalarType::Float);
  Tensor v = torch::stable::empty({B, T, key_out}, ScalarType::Float);
  multiply(normed.data(), rows, query, write<float>(q), query_out);
  multiply(normed.data(), rows, key, write<float>(k), key_out);
  multiply(normed.data(), rows, value, write<float>(v), key_out);
  const float *cosine = read<float>(cos), *sine = read<float>(sin);
  const int64_t table_rows = cos.size(0) * T;
  if (rows > 0) {
    turn(write<float>(q), rows, query_out, D, query_norm ? norm_of(*query_norm, D) : nullptr, static_cast<float>(head_eps),
         cosine, sine, table_rows);
    turn(write<float>(k), rows, key_out, D, key_norm ? norm_of(*key_norm, D) : nullptr, static_cast<float>(head_eps), cosine,
         sine, table_rows);
  }
  return {q, k, v};
}

// r = x + mixed times output; r + swiglu(norm(r)): float32 [..., K] from x [..., K] and mixed [..., inputs].
Tensor layer_rest(const Tensor& x, const Tensor& mixed, const Tensor& output, const Tensor& norm, double eps,
                  const Tensor& gate, const Tensor& up, const Tensor& down, int64_t inner) {
  STD_TORCH_CHECK(x.dim() >= 1 && mixed.dim() >= 1, "layer_rest: x and mixed must have rows");
  check(x, ScalarType::Float, x.dim(), "x");
  check(mixed, ScalarType::Float, mixed.dim(), "mixed");
  const int64_t K = x.size(x.dim() - 1), inputs = mixed.size(mixed.dim() - 1), rows = K > 0 ? x.numel() / K : 0;
  STD_TORCH_CHECK(inputs > 0 && mixed.numel() == rows * inputs, "layer_rest: mixed does not fit x");
  check_packed(output, inputs, K);
  check_packed(gate, K, inner);
  check_packed(up, K, inner);
  check_packed(down, inner, K);
  const float* weight = norm_of(norm, K);
  Tensor out = torch::stable::empty(x.sizes(), ScalarType::Float);
  auto* to = write<float>(out);
  std::vector<float> normed(rows * K), gated(rows * inner), other(rows * inner), last(rows * K);
  multiply(read<float>(mixed), rows, output, to, K);
  const float* residual = read<float>(x);
  for (int64_t i = 0; i < rows * K; i++) to[i] = residual[i] + to[i];
  kernels().normalise(to, weight, normed.data(), rows, K, static_cast<float>(eps));
  multiply(normed.data(), rows, gate, gated.data(), inner);
  multiply(normed.data(), rows, up, other.data(), inner);
  gate_with(gated.data(), other.data(), rows * inner);
  multiply(gated.data(), rows, down, last.data(), K);
  for (int64_t i = 0; i < rows * K; i++) to[i] = to[i] + last[i];
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specblock, m) {
  m.def("attention_inputs(Tensor x, Tensor norm, float eps, Tensor query, Tensor key, Tensor value, int query_out, "
        "int key_out, Tensor cos, Tensor sin, Tensor? query_norm, Tensor? key_norm, float head_eps) -> "
        "(Tensor, Tensor, Tensor)");
  m.def("layer_rest(Tensor x, Tensor mixed, Tensor output, Tensor norm, float eps, Tensor gate, Tensor up, Tensor down, "
        "int inner) -> Tensor");
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

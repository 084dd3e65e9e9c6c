// Registers the CUDA operations between the products of a decoder layer. The kernels are in cuda/norm.cu, rotary.cu, gated.cu.
#ifdef SPECBLOCK_CUDA

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <tuple>

#include "cuda/layer.h"
#include "cuda_checks.h"

namespace {

using namespace specblock;

FloatType type_of(const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::BFloat16) return FloatType::kBfloat16;
  if (tensor.scalar_type() == ScalarType::Half) return FloatType::kHalf;
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "expected bfloat16, float16 or float32");
  return FloatType::kFloat;
}

// Contiguous, of the device and type of another, every row in whole vectors.
void check_rows(const Tensor& tensor, const Tensor& like, int64_t dims, const char* what) {
  check_cuda_contiguous(tensor, like, like.scalar_type(), dims, what);
  const int64_t bytes = tensor.size(dims - 1) * static_cast<int64_t>(tensor.element_size());
  STD_TORCH_CHECK(bytes % 16 == 0 && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0, what,
                  ": rows must be aligned to 16 bytes");
}

NormInputs norm_inputs(const Tensor& x, const Tensor& weight, double eps) {
  STD_TORCH_CHECK(x.dim() >= 1, "rms_norm: expected x [..., K]");
  check_rows(x, x, x.dim(), "rms_norm: x");
  check_rows(weight, x, 1, "rms_norm: weight");
  const int64_t K = x.size(x.dim() - 1);
  STD_TORCH_CHECK(K > 0 && weight.size(0) == K, "rms_norm: the weight does not fit");
  STD_TORCH_CHECK(x.numel() / K <= std::numeric_limits<int32_t>::max(), "rms_norm: too many rows");
  return {.x = x.const_data_ptr(), .residual = nullptr, .weight = weight.const_data_ptr(), .sum = nullptr, .out = nullptr,
          .rows = x.numel() / K, .size = K, .eps = static_cast<float>(eps), .type = type_of(x)};
}

// x [..., K], weight [K] -> [..., K].
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  NormInputs inputs = norm_inputs(x, weight, eps);
  const CudaScope scope(x);
  Tensor out = torch::stable::empty_like(x);
  inputs.out = out.mutable_data_ptr();
  check_launch(launch_norm(inputs, scope.stream()), "rms_norm");
  return out;
}

// x and residual [..., K], weight [K] -> their sum and its norm.
std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  NormInputs inputs = norm_inputs(x, weight, eps);
  check_rows(residual, x, x.dim(), "add_rms_norm: residual");
  for (int64_t d = 0; d < x.dim(); d++) STD_TORCH_CHECK(residual.size(d) == x.size(d), "add_rms_norm: the residual does not fit");
  const CudaScope scope(x);
  Tensor sum = torch::stable::empty_like(x), out = torch::stable::empty_like(x);
  inputs.residual = residual.const_data_ptr();
  inputs.sum = sum.mutable_data_ptr();
  inputs.out = out.mutable_data_ptr();
  check_launch(launch_norm(inputs, scope.stream()), "add_rms_norm");
  return {sum, out};
}

void check_storage(const Tensor& storage, const Tensor& like) {
  check_cuda(storage, like, like.scalar_type(), 4, "rotary_store: storage");
  STD_TORCH_CHECK(storage.stride(3) == 1 && aligned_rows(storage), "rotary_store: rows of the storage must be aligned");
}

// qkv [B, R, (H + 2 G) D], cos and sin [B, R, D], keys and values [slots, G, C, D], slots int64 [B], positions int64 [B, R]
// -> queries [B, R, H, D].
Tensor rotary_store(const Tensor& qkv, const Tensor& cos, const Tensor& sin, std::optional<Tensor> q_norm,
                    std::optional<Tensor> k_norm, double eps, Tensor keys, Tensor values, const Tensor& slots,
                    const Tensor& positions) {
  check_rows(qkv, qkv, 3, "rotary_store: qkv");
  const int64_t B = qkv.size(0), R = qkv.size(1);
  for (const Tensor* t : {&cos, &sin}) {
    check_rows(*t, qkv, 3, "rotary_store: cos or sin");
    STD_TORCH_CHECK(t->size(0) == B && t->size(1) == R, "rotary_store: the tables do not fit");
  }
  const int64_t D = cos.size(2);
  check_storage(keys, qkv);
  check_storage(values, qkv);
  const int64_t G = keys.size(1);
  for (int64_t d = 0; d < 4; d++) STD_TORCH_CHECK(values.size(d) == keys.size(d), "rotary_store: values do not fit keys");
  STD_TORCH_CHECK(D > 0 && D <= 1024 && sin.size(2) == D && keys.size(3) == D && qkv.size(2) % D == 0, "rotary_store: heads do not fit");
  const int64_t H = qkv.size(2) / D - 2 * G;
  STD_TORCH_CHECK(H > 0 && G > 0, "rotary_store: there must be queries, keys and values");
  for (const std::optional<Tensor>* t : {&q_norm, &k_norm}) {
    if (!t->has_value()) continue;
    check_rows(**t, qkv, 1, "rotary_store: norm");
    STD_TORCH_CHECK((*t)->size(0) == D, "rotary_store: a norm does not fit");
  }
  check_cuda_contiguous(slots, qkv, ScalarType::Long, 1, "slots");
  check_cuda_contiguous(positions, qkv, ScalarType::Long, 2, "positions");
  STD_TORCH_CHECK(slots.size(0) == B && positions.size(0) == B && positions.size(1) == R, "rotary_store: places do not fit");
  STD_TORCH_CHECK(qkv.numel() < std::numeric_limits<int32_t>::max(), "rotary_store: too many rows");
  const CudaScope scope(qkv);
  Tensor out = torch::stable::new_empty(qkv, {B, R, H, D});
  const RotaryInputs inputs{
      .qkv = qkv.const_data_ptr(), .cos = cos.const_data_ptr(), .sin = sin.const_data_ptr(),
      .q_norm = q_norm ? q_norm->const_data_ptr() : nullptr, .k_norm = k_norm ? k_norm->const_data_ptr() : nullptr,
      .keys = keys.mutable_data_ptr(), .values = values.mutable_data_ptr(),
      .slot = read<int64_t>(slots), .position = read<int64_t>(positions), .out = out.mutable_data_ptr(),
      .key_slot = keys.stride(0), .key_head = keys.stride(1), .key_row = keys.stride(2),
      .value_slot = values.stride(0), .value_head = values.stride(1), .value_row = values.stride(2),
      .slots = keys.size(0), .capacity = keys.size(2), .B = B, .R = R,
      .H = static_cast<int>(H), .G = static_cast<int>(G), .D = static_cast<int>(D),
      .eps = static_cast<float>(eps), .type = type_of(qkv), .wide_tables = false};
  check_launch(launch_rotary(inputs, scope.stream()), "rotary_store");
  return out;
}

// x [B, R, H D], cos and sin float32 [B, R, D] -> [B, R, H, D].
Tensor rotary_heads(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  check_rows(x, x, 3, "rotary_heads: x");
  const int64_t B = x.size(0), R = x.size(1);
  for (const Tensor* t : {&cos, &sin}) {
    check_cuda_contiguous(*t, x, ScalarType::Float, 3, "rotary_heads: cos or sin");
    STD_TORCH_CHECK(t->size(0) == B && t->size(1) == R && aligned_rows(*t), "rotary_heads: the tables do not fit");
  }
  const int64_t D = cos.size(2);
  STD_TORCH_CHECK(D > 0 && D <= 1024 && sin.size(2) == D && x.size(2) % D == 0, "rotary_heads: heads do not fit");
  STD_TORCH_CHECK(x.numel() < std::numeric_limits<int32_t>::max(), "rotary_heads: too many rows");
  const CudaScope scope(x);
  const int64_t H = x.size(2) / D;
  Tensor out = torch::stable::new_empty(x, {B, R, H, D});
  const RotaryInputs inputs{.qkv = x.const_data_ptr(), .cos = cos.const_data_ptr(), .sin = sin.const_data_ptr(),
                            .out = out.mutable_data_ptr(), .B = B, .R = R, .H = static_cast<int>(H), .G = 0,
                            .D = static_cast<int>(D), .type = type_of(x), .wide_tables = true};
  check_launch(launch_rotary(inputs, scope.stream()), "rotary_heads");
  return out;
}

// gate and up [M, K], which may be columns of one product -> [M, K].
Tensor gated(const Tensor& gate, const Tensor& up) {
  for (const Tensor* t : {&gate, &up}) {
    check_cuda(*t, gate, gate.scalar_type(), 2, "gated");
    STD_TORCH_CHECK(t->size(0) == gate.size(0) && t->size(1) == gate.size(1), "gated: gate and up must be of one shape");
    STD_TORCH_CHECK(t->stride(1) == 1 && aligned_rows(*t) && t->size(1) * static_cast<int64_t>(t->element_size()) % 16 == 0,
                    "gated: rows must be aligned to 16 bytes");
  }
  const int64_t M = gate.size(0), K = gate.size(1);
  const CudaScope scope(gate);
  Tensor out = torch::stable::new_empty(gate, {M, K});
  const GatedInputs inputs{.gate = gate.const_data_ptr(), .up = up.const_data_ptr(), .gate_row = gate.stride(0),
                           .up_row = up.stride(0), .out = out.mutable_data_ptr(), .rows = M, .size = K, .type = type_of(gate)};
  check_launch(launch_gated(inputs, scope.stream()), "gated");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(specblock, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rotary_store", TORCH_BOX(&rotary_store));
  m.impl("rotary_heads", TORCH_BOX(&rotary_heads));
  m.impl("gated", TORCH_BOX(&gated));
}

#endif  // SPECBLOCK_CUDA

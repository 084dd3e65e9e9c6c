// Registers attention over the slots of a cache, and its operation on the CPU; ops_cuda_attention.cpp has the CUDA one.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>

#include "checks.h"
#include "kernels.h"

namespace {

using namespace specblock;

// query [B, H, R, D], key and value [S, G, C, D] (any strides but the last), slots and lengths int64 [B],
// visible bool [B, R, R] -> [B, R, H, D].
Tensor slot_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& slots,
                      const Tensor& lengths, const Tensor& visible, double scale) {
  for (const Tensor* t : {&query, &key, &value}) {
    STD_TORCH_CHECK(t->is_cpu() && t->dim() == 4, "slot_attention: expected four dimensions on the CPU");
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, "slot_attention: query, key and value must be float32");
    STD_TORCH_CHECK(t->stride(3) == 1, "slot_attention: heads must be contiguous");
  }
  const int64_t B = query.size(0), H = query.size(1), R = query.size(2), D = query.size(3);
  const int64_t S = key.size(0), G = key.size(1), C = key.size(2);
  STD_TORCH_CHECK(D > 0 && D % 16 == 0, "slot_attention: head size must be a multiple of 16");
  STD_TORCH_CHECK(key.size(3) == D && G > 0 && H > 0 && H % G == 0, "slot_attention: key does not fit query");
  STD_TORCH_CHECK(value.size(0) == S && value.size(1) == G && value.size(2) == C && value.size(3) == D,
                  "slot_attention: value does not fit key");
  check(slots, ScalarType::Long, 1, "slots");
  check(lengths, ScalarType::Long, 1, "lengths");
  check(visible, ScalarType::Bool, 3, "visible");
  STD_TORCH_CHECK(slots.size(0) == B && lengths.size(0) == B, "slot_attention: one slot and length per request expected");
  STD_TORCH_CHECK(visible.size(0) == B && visible.size(1) == R && visible.size(2) == R, "slot_attention: visible does not fit");
  const auto *slot = read<int64_t>(slots), *length = read<int64_t>(lengths);
  for (int64_t b = 0; b < B; b++)
    STD_TORCH_CHECK(slot[b] >= 0 && slot[b] < S && length[b] >= 0 && length[b] + R <= C,
                    "slot_attention: slot or length out of range");
  Tensor out = torch::stable::empty({B, R, H, D}, ScalarType::Float);
  const auto *q = read<float>(query), *k = read<float>(key), *v = read<float>(value);
  const auto* seen = read<bool>(visible);
  auto* to = write<float>(out);
  const int64_t q0 = query.stride(0), q1 = query.stride(1), q2 = query.stride(2);
  const int64_t k0 = key.stride(0), k1 = key.stride(1), k2 = key.stride(2);
  const int64_t v0 = value.stride(0), v1 = value.stride(1), v2 = value.stride(2);
  torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      const int64_t T = length[b] + R;
      const auto mask = std::make_unique<bool[]>(R * T);
      for (int64_t r = 0; r < R; r++) {
        std::fill_n(mask.get() + r * T, length[b], true);
        std::copy_n(seen + (b * R + r) * R, R, mask.get() + r * T + length[b]);
      }
      for (int64_t g = 0; g < G; g++)
        specblock::kernels().attend({
            .query = q + b * q0 + g * (H / G) * q1, .query_head = q1, .query_row = q2,
            .key = k + slot[b] * k0 + g * k1, .key_row = k2,
            .value = v + slot[b] * v0 + g * v1, .value_row = v2,
            .mask = mask.get(), .mask_row = T,
            .out = to + b * R * H * D + g * (H / G) * D, .out_row = H * D, .out_head = D,
            .heads = H / G, .rows = R, .T = T, .D = D, .scale = static_cast<float>(scale),
        });
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specblock, m) {
  m.def("slot_attention(Tensor query, Tensor key, Tensor value, Tensor slots, Tensor lengths, Tensor visible, float scale) "
        "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(specblock, CPU, m) { m.impl("slot_attention", TORCH_BOX(&slot_attention)); }

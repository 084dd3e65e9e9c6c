// The CUDA operation of slot attention: checks, workspace and launches. The kernels are in cuda/slot_*.cu.
#ifdef SPECBLOCK_CUDA

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>

#include "cuda/slot_attention.h"
#include "cuda_checks.h"

namespace {

using namespace specblock;

SlotType type_of(ScalarType type) {
  if (type == ScalarType::BFloat16) return SlotType::kBfloat16;
  if (type == ScalarType::Half) return SlotType::kHalf;
  STD_TORCH_CHECK(type == ScalarType::Float, "slot_attention: expected bfloat16, float16 or float32");
  return SlotType::kFloat;
}

// As on the CPU, but slots and lengths stay on the device, unread: where they are out of range the result is NaN.
Tensor slot_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& slots,
                      const Tensor& lengths, const Tensor& visible, double scale) {
  const ScalarType type = query.scalar_type();
  const SlotType kind = type_of(type);
  for (const Tensor* t : {&query, &key, &value}) {
    check_cuda(*t, query, type, 4, "slot_attention: query, key or value");
    STD_TORCH_CHECK(t->stride(3) == 1, "slot_attention: heads must be contiguous");
  }
  const int64_t B = query.size(0), H = query.size(1), R = query.size(2), D = query.size(3);
  const int64_t S = key.size(0), G = key.size(1), C = key.size(2);
  STD_TORCH_CHECK(D == 64 || D == 128, "slot_attention: head size must be 64 or 128");
  STD_TORCH_CHECK(key.size(3) == D && G > 0 && H > 0 && H % G == 0, "slot_attention: key does not fit query");
  STD_TORCH_CHECK(value.size(0) == S && value.size(1) == G && value.size(2) == C && value.size(3) == D,
                  "slot_attention: value does not fit key");
  STD_TORCH_CHECK(aligned_rows(key) && aligned_rows(value), "slot_attention: rows of the cache must be aligned to 16 bytes");
  check_cuda_contiguous(slots, query, ScalarType::Long, 1, "slots");
  check_cuda_contiguous(lengths, query, ScalarType::Long, 1, "lengths");
  check_cuda_contiguous(visible, query, ScalarType::Bool, 3, "visible");
  STD_TORCH_CHECK(slots.size(0) == B && lengths.size(0) == B, "slot_attention: one slot and length per request expected");
  STD_TORCH_CHECK(visible.size(0) == B && visible.size(1) == R && visible.size(2) == R, "slot_attention: visible does not fit");
  STD_TORCH_CHECK(scale > 0, "slot_attention: scale must be positive");
  STD_TORCH_CHECK(B * G <= 65535 && C < (1 << 30) && R * H < (1 << 24) && B * R * H < std::numeric_limits<int32_t>::max(),
                  "slot_attention: too many requests, rows or tokens");
  Tensor out = torch::stable::new_empty(query, {B, R, H, D});
  if (out.numel() == 0) return out;
  STD_TORCH_CHECK(C >= R, "slot_attention: more rows than the cache has places");
  const CudaScope scope(query);
  SlotAttention a{
      .query = query.const_data_ptr(), .key = key.const_data_ptr(), .value = value.const_data_ptr(),
      .query_batch = query.stride(0), .query_head = query.stride(1), .query_row = query.stride(2),
      .key_slot = key.stride(0), .key_head = key.stride(1), .key_row = key.stride(2),
      .value_slot = value.stride(0), .value_head = value.stride(1), .value_row = value.stride(2),
      .slots = read<int64_t>(slots), .lengths = read<int64_t>(lengths), .visible = read<bool>(visible),
      .out = out.mutable_data_ptr(), .mixture = nullptr, .peak = nullptr,
      .num_slots = S, .capacity = C,
      .B = static_cast<int>(B), .H = static_cast<int>(H), .G = static_cast<int>(G), .R = static_cast<int>(R),
      .D = static_cast<int>(D), .splits = 1, .split_tokens = 0,
      .scale_log2 = static_cast<float>(scale * 1.4426950408889634), .query_is_aligned = aligned_rows(query), .type = kind,
  };
  const bool exact = kind == SlotType::kFloat;
  a.splits = exact ? static_cast<int>(slot_splits(C)) : slot_tile_splits(a);
  if (exact) a.split_tokens = static_cast<int>(slot_split_tokens(C));
  const bool joined = exact || a.splits > 1;
  const int64_t rows = joined ? B * H * R * a.splits : 0;
  Tensor mixture = torch::stable::new_empty(query, {rows * D}, ScalarType::Float);
  Tensor peak = torch::stable::new_empty(query, {rows * 2}, ScalarType::Float);
  a.mixture = write<float>(mixture);
  a.peak = write<float>(peak);
  check_launch((exact ? launch_slot_tiles_float : launch_slot_tiles)(a, scope.stream()), "slot_attention");
  if (joined) check_launch(launch_slot_combine(a, scope.stream()), "slot_attention");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(specblock, CUDA, m) { m.impl("slot_attention", TORCH_BOX(&slot_attention)); }

#endif  // SPECBLOCK_CUDA

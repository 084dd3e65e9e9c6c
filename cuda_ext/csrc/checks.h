// What every operation checks before it touches memory.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace specblock {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(const Tensor& tensor, ScalarType type, int64_t dims, const char* what) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type && tensor.dim() == dims, what,
                  ": expected a contiguous CPU tensor of another type or number of dimensions");
}

template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* write(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// The sampling parameters of N rows: temperature, top_p, min_p float64 [N]; top_k int64 [N].
inline void check_sampling(const Tensor& temperature, const Tensor& top_p, const Tensor& top_k, const Tensor& min_p, int64_t N) {
  for (const Tensor* t : {&temperature, &top_p, &min_p}) {
    check(*t, ScalarType::Double, 1, "sampling parameters");
    STD_TORCH_CHECK(t->size(0) == N, "sampling parameters: one per row expected");
  }
  check(top_k, ScalarType::Long, 1, "top_k");
  STD_TORCH_CHECK(top_k.size(0) == N, "top_k: one per row expected");
}

// Rows of `noise` float64 [X, V] by number; every number is checked, because they address memory.
inline void check_noise_rows(const Tensor& noise, const Tensor& noise_row, int64_t vocab_size) {
  check(noise, ScalarType::Double, 2, "noise");
  STD_TORCH_CHECK(noise.size(1) >= vocab_size, "noise does not fit the logits");
  const auto* row = read<int64_t>(noise_row);
  for (int64_t n = 0; n < noise_row.numel(); n++)
    STD_TORCH_CHECK(row[n] >= 0 && row[n] < noise.size(0), "noise_row is out of range");
}

inline void check_noise(const Tensor& noise, const Tensor& noise_row, int64_t N, int64_t vocab_size) {
  check(noise_row, ScalarType::Long, 1, "noise_row");
  STD_TORCH_CHECK(noise_row.size(0) == N, "noise does not fit the logits");
  check_noise_rows(noise, noise_row, vocab_size);
}

}  // namespace specblock

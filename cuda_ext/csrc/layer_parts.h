// The two halves of a decoder layer around its attention, on raw rows: what every operation of a layer is made of.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "checks.h"
#include "kernels.h"
#include "products.h"
#include "rotary.h"

namespace specblock {

inline const float* norm_of(const Tensor& norm, int64_t size) {
  check(norm, ScalarType::Float, 1, "norm");
  STD_TORCH_CHECK(norm.size(0) == size, "the norm does not fit the rows");
  return read<float>(norm);
}

// Heads of `size` in rows [rows, outputs], normalised (with a norm) and rotated: row r by row place[r] of the tables.
inline void turn(float* rows, int64_t count, int64_t outputs, int64_t size, const float* norm, float eps,
                 const float* cosine, const float* sine, const std::vector<int64_t>& place) {
  if (norm != nullptr) kernels().normalise(rows, norm, rows, count * (outputs / size), size, eps);
  for (int64_t row = 0; row < count; row++)
    for (int64_t head = 0; head < outputs / size; head++)
      rotate(rows + row * outputs + head * size, cosine + place[row] * size, sine + place[row] * size, size);
}

// The rows of rotary tables [B or 1, T, D] that the rows of x [B, T, ...] are turned by.
inline std::vector<int64_t> table_rows(const Tensor& cos, int64_t rows) {
  std::vector<int64_t> place(rows);
  const int64_t count = cos.size(0) * cos.size(1);
  for (int64_t row = 0; row < rows; row++) place[row] = row % count;
  return place;
}

inline void check_tables(const Tensor& cos, const Tensor& sin, int64_t B, int64_t T, int64_t query_out, int64_t key_out) {
  check(cos, ScalarType::Float, 3, "cos");
  check(sin, ScalarType::Float, 3, "sin");
  const int64_t D = cos.size(2);
  for (const Tensor* t : {&cos, &sin})
    STD_TORCH_CHECK((t->size(0) == B || t->size(0) == 1) && t->size(0) == cos.size(0) && t->size(1) == T && t->size(2) == D,
                    "cos and sin do not fit x");
  STD_TORCH_CHECK(D > 0 && D % 2 == 0 && query_out % D == 0 && key_out % D == 0, "heads do not fit the products");
}

// What comes after attention; checked to take rows of `inputs` into a residual stream of K.
struct Rest {
  const Tensor& output;
  const float* norm;
  float eps;
  const Tensor& gate;
  const Tensor& up;
  const Tensor& down;
  int64_t inner, K;
  bool coarse;  // see kernels.h

  Rest(const Tensor& output, const Tensor& norm, double eps, const Tensor& gate, const Tensor& up, const Tensor& down,
       int64_t inner, int64_t inputs, int64_t K, bool coarse)
      : output(output), norm(norm_of(norm, K)), eps(static_cast<float>(eps)), gate(gate), up(up), down(down), inner(inner), K(K), coarse(coarse) {
    check_packed(output, inputs, K);
    check_packed(gate, K, inner);
    check_packed(up, K, inner);
    check_packed(down, inner, K);
  }

  // to = r + swiglu(norm(r)) with r = residual + mixed times output; `to` is none of the others.
  void operator()(const float* residual, const float* mixed, int64_t rows, float* to) const {
    std::vector<float> normed(rows * K), gated(rows * inner), other(rows * inner);
    multiply(mixed, rows, output, to, K, coarse);
    for (int64_t i = 0; i < rows * K; i++) to[i] = residual[i] + to[i];
    kernels().normalise(to, norm, normed.data(), rows, K, eps);
    multiply(normed.data(), rows, gate, gated.data(), inner, coarse);
    multiply(normed.data(), rows, up, other.data(), inner, coarse);
    gate_with(gated.data(), other.data(), rows * inner);
    multiply(gated.data(), rows, down, normed.data(), K, coarse);
    for (int64_t i = 0; i < rows * K; i++) to[i] = to[i] + normed[i];
  }
};

}  // namespace specblock

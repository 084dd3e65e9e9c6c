// Checks that the CUDA operations of a cycle share.
#pragma once

#include "cuda/cycle.h"
#include "cuda_checks.h"

namespace specblock {

inline LogitType logit_type(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return LogitType::kFloat;
    case ScalarType::Double: return LogitType::kDouble;
    case ScalarType::BFloat16: return LogitType::kBfloat16;
    case ScalarType::Half: return LogitType::kHalf;
    default: STD_TORCH_CHECK(false, "logits: expected a floating-point type"); return LogitType::kFloat;
  }
}

// The sampling parameters of N rows, see check_sampling.
inline void check_cuda_sampling(const Tensor& temperature, const Tensor& top_p, const Tensor& top_k, const Tensor& min_p,
                                const Tensor& like, int64_t N) {
  for (const Tensor* t : {&temperature, &top_p, &min_p}) {
    check_cuda_contiguous(*t, like, ScalarType::Double, 1, "sampling parameters");
    STD_TORCH_CHECK(t->size(0) == N, "sampling parameters: one per row expected");
  }
  check_cuda_contiguous(top_k, like, ScalarType::Long, 1, "top_k");
  STD_TORCH_CHECK(top_k.size(0) == N, "top_k: one per row expected");
}

}  // namespace specblock

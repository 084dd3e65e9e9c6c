// Registers the CUDA side of what a cycle does beside its forwards: noise, the target's choice, what is kept of it. The
// schemas are those of the CPU operations, and so are the results.
#ifdef SPECBLOCK_CUDA

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "cuda_cycle.h"

namespace {

using namespace specblock;

// Logits [..., V]; N laws.
ChoiceInputs choice_inputs(const Tensor& logits, int64_t dims, const Tensor& noise, const Tensor& noise_row,
                           const Tensor& temperature, const Tensor& top_p, const Tensor& top_k, const Tensor& min_p, int64_t N) {
  check_cuda_contiguous(logits, logits, logits.scalar_type(), dims, "logits");
  check_cuda_contiguous(noise, logits, ScalarType::Double, 2, "noise");
  const int64_t V = logits.size(dims - 1);
  STD_TORCH_CHECK(V > 0 && V < (int64_t{1} << 31), "choose: the vocabulary is empty or too large");
  STD_TORCH_CHECK(noise.size(1) >= V && noise.size(0) > 0, "noise does not fit the logits");
  check_cuda_sampling(temperature, top_p, top_k, min_p, logits, N);
  return {.logits = logits.const_data_ptr(), .type = logit_type(logits), .vocab_size = V, .noise = read<double>(noise),
          .noise_rows = noise.size(0), .noise_size = noise.size(1), .noise_row = read<int64_t>(noise_row),
          .temperature = read<double>(temperature), .top_p = read<double>(top_p), .min_p = read<double>(min_p),
          .top_k = read<int64_t>(top_k)};
}

// seed, choice, position int64 [N] -> float64 [N, vocab_size] in (0, 1).
Tensor philox_uniform(const Tensor& seed, const Tensor& choice, const Tensor& position, int64_t vocab_size) {
  for (const Tensor* t : {&seed, &choice, &position}) {
    check_cuda_contiguous(*t, seed, ScalarType::Long, 1, "philox_uniform");
    STD_TORCH_CHECK(t->size(0) == seed.size(0), "philox_uniform: vectors must be of one length");
  }
  STD_TORCH_CHECK(vocab_size > 0, "philox_uniform: vocab_size must be positive");
  const CudaScope scope(seed);
  Tensor out = torch::stable::new_empty(seed, {seed.size(0), vocab_size}, ScalarType::Double);
  check_launch(specblock_cuda_philox(read<int64_t>(seed), read<int64_t>(choice), read<int64_t>(position), write<double>(out),
                                     seed.size(0), vocab_size, scope.stream()),
               "philox_uniform");
  return out;
}

// logits of any float type [N, V] -> int64 [N].
Tensor choose(const Tensor& logits, const Tensor& noise, const Tensor& noise_row, const Tensor& temperature,
              const Tensor& top_p, const Tensor& top_k, const Tensor& min_p) {
  check_cuda_contiguous(noise_row, logits, ScalarType::Long, 1, "noise_row");
  STD_TORCH_CHECK(logits.dim() == 2 && noise_row.size(0) == logits.size(0), "noise does not fit the logits");
  const int64_t N = logits.size(0);
  const ChoiceInputs inputs = choice_inputs(logits, 2, noise, noise_row, temperature, top_p, top_k, min_p, N);
  const CudaScope scope(logits);
  Tensor out = torch::stable::new_empty(logits, {N}, ScalarType::Long);
  check_launch(specblock_cuda_choose(&inputs, N, write<int64_t>(out), scope.stream()), "choose");
  return out;
}

// As on the CPU, for logits of any float type.
std::tuple<Tensor, Tensor, Tensor> accept_walk(const Tensor& logits, const Tensor& token, const Tensor& parent,
                                               const Tensor& noise, const Tensor& noise_row, const Tensor& temperature,
                                               const Tensor& top_p, const Tensor& top_k, const Tensor& min_p) {
  STD_TORCH_CHECK(logits.dim() == 3, "accept_walk: logits must be [B, R, V]");
  const int64_t B = logits.size(0), R = logits.size(1);
  STD_TORCH_CHECK(R > 0 && R < (int64_t{1} << 30), "accept_walk: there is nothing to choose from");
  for (const Tensor* t : {&token, &parent}) {
    check_cuda_contiguous(*t, logits, ScalarType::Long, 2, "tree");
    STD_TORCH_CHECK(t->size(0) == B && t->size(1) == R, "accept_walk: the trees do not fit the logits");
  }
  check_cuda_contiguous(noise_row, logits, ScalarType::Long, 2, "noise_row");
  const int64_t W = noise_row.size(1);
  STD_TORCH_CHECK(noise_row.size(0) == B && W > 0, "accept_walk: noise_row does not fit the logits");
  const ChoiceInputs inputs = choice_inputs(logits, 3, noise, noise_row, temperature, top_p, top_k, min_p, B);
  const CudaScope scope(logits);
  Tensor tokens = torch::stable::new_empty(logits, {B, W}, ScalarType::Long);
  Tensor rows = torch::stable::new_empty(logits, {B, W}, ScalarType::Long);
  Tensor count = torch::stable::new_empty(logits, {B}, ScalarType::Long);
  const WalkInputs walk{.token = read<int64_t>(token), .parent = read<int64_t>(parent), .requests = B, .rows = R, .levels = W,
                        .tokens = write<int64_t>(tokens), .path = write<int64_t>(rows), .count = write<int64_t>(count)};
  check_launch(specblock_cuda_accept_walk(&inputs, &walk, scope.stream()), "accept_walk");
  return {tokens, rows, count};
}

// As on the CPU; `rows` may be columns cut out of a wider tensor.
void commit_rows(Tensor storage, const Tensor& slots, const Tensor& start, const Tensor& rows) {
  check_cuda_contiguous(storage, storage, storage.scalar_type(), 5, "commit_rows: storage");
  check_cuda_contiguous(slots, storage, ScalarType::Long, 1, "slots");
  check_cuda_contiguous(start, storage, ScalarType::Long, 1, "start");
  check_cuda(rows, storage, ScalarType::Long, 2, "rows");
  const int64_t B = slots.size(0);
  STD_TORCH_CHECK(start.size(0) == B && rows.size(0) == B, "commit_rows: one path and start per slot expected");
  STD_TORCH_CHECK(rows.size(1) <= 1 || rows.stride(1) == 1, "commit_rows: a path must be contiguous");
  const CommitInputs inputs{.storage = storage.mutable_data_ptr(), .layers = storage.size(0), .slots = storage.size(1),
                            .heads = storage.size(2), .capacity = storage.size(3),
                            .row_bytes = storage.size(4) * static_cast<int64_t>(storage.element_size()),
                            .slot = read<int64_t>(slots), .start = read<int64_t>(start), .row = read<int64_t>(rows),
                            .requests = B, .moved = rows.size(1), .row_stride = rows.stride(0)};
  const CudaScope scope(storage);
  check_launch(specblock_cuda_commit_rows(&inputs, scope.stream()), "commit_rows");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(specblock, CUDA, m) {
  m.impl("philox_uniform", TORCH_BOX(&philox_uniform));
  m.impl("choose", TORCH_BOX(&choose));
  m.impl("accept_walk", TORCH_BOX(&accept_walk));
  m.impl("commit_rows", TORCH_BOX(&commit_rows));
}

#endif  // SPECBLOCK_CUDA

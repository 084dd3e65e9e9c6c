// Registers what ends a cycle: walking the trees by the target's choices, and keeping the rows of the accepted paths.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "checks.h"
#include "kernels.h"

namespace {

using namespace specblock;

struct Walk {
  const int64_t *token, *parent;  // [R]
  int64_t rows, levels;
  int64_t *tokens, *path;         // [levels]
};

// Follows the tree while a child carries what the target says, of logits [rows, size]; returns the number of tokens said.
int64_t walk(const Walk& w, ChoiceRow logits, const double* noise, int64_t noise_size, const int64_t* noise_row) {
  const float* narrow = logits.logits;
  const double* wide = logits.wide;
  int64_t row = 0, level = 0;
  for (; level < w.levels; level++) {
    w.path[level] = row;
    logits.logits = narrow ? narrow + row * logits.size : nullptr;
    logits.wide = wide ? wide + row * logits.size : nullptr;
    logits.noise = noise + noise_row[level] * noise_size;
    const int64_t said = kernels().choose(logits);
    w.tokens[level] = said;
    int64_t child = row + 1;
    while (child < w.rows && !(w.parent[child] == row && w.token[child] == said)) child++;
    if (child == w.rows) {
      level++;
      break;
    }
    row = child;
  }
  for (int64_t i = level; i < w.levels; i++) {
    w.tokens[i] = -1;
    w.path[i] = i;
  }
  return level;
}

// logits float32 or float64 [B, R, V], trees int64 [B, R], noise float64 [X, V] with its rows int64 [B, W] of every level
// -> tokens int64 [B, W] padded with -1, rows int64 [B, W] padded with their column, how many int64 [B].
std::tuple<Tensor, Tensor, Tensor> accept_walk(const Tensor& logits, const Tensor& token, const Tensor& parent,
                                               const Tensor& noise, const Tensor& noise_row, const Tensor& temperature,
                                               const Tensor& top_p, const Tensor& top_k, const Tensor& min_p) {
  const bool wide = logits.scalar_type() == ScalarType::Double;
  check(logits, wide ? ScalarType::Double : ScalarType::Float, 3, "logits");
  const int64_t B = logits.size(0), R = logits.size(1), V = logits.size(2);
  STD_TORCH_CHECK(R > 0 && V > 0, "accept_walk: there is nothing to choose from");
  for (const Tensor* t : {&token, &parent}) {
    check(*t, ScalarType::Long, 2, "tree");
    STD_TORCH_CHECK(t->size(0) == B && t->size(1) == R, "accept_walk: the trees do not fit the logits");
  }
  check(noise_row, ScalarType::Long, 2, "noise_row");
  const int64_t W = noise_row.size(1);
  STD_TORCH_CHECK(noise_row.size(0) == B && W > 0, "accept_walk: noise_row does not fit the logits");
  check_noise_rows(noise, noise_row, V);
  check_sampling(temperature, top_p, top_k, min_p, B);
  Tensor tokens = torch::stable::empty({B, W}, ScalarType::Long), rows = torch::stable::empty({B, W}, ScalarType::Long);
  Tensor count = torch::stable::empty({B}, ScalarType::Long);
  auto *tokens_at = write<int64_t>(tokens), *rows_at = write<int64_t>(rows), *count_at = write<int64_t>(count);
  torch::stable::parallel_for(0, B, (1 << 14) / V + 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      const ChoiceFilters filters{read<double>(temperature)[b], read<double>(top_p)[b], read<double>(min_p)[b],
                                  read<int64_t>(top_k)[b]};
      const Walk w{read<int64_t>(token) + b * R, read<int64_t>(parent) + b * R, R, W, tokens_at + b * W, rows_at + b * W};
      const int64_t* levels = read<int64_t>(noise_row) + b * W;
      const auto* noises = read<double>(noise);
      const ChoiceRow tree{wide ? nullptr : read<float>(logits) + b * R * V, wide ? read<double>(logits) + b * R * V : nullptr,
                           V, filters, nullptr};
      count_at[b] = walk(w, tree, noises, noise.size(1), levels);
    }
  });
  return {tokens, rows, count};
}

// storage [layers, slots, heads, capacity, D]: row rows[b][j] of the staged ones moves to position start[b] + j.
void commit_rows(Tensor storage, const Tensor& slots, const Tensor& start, const Tensor& rows) {
  STD_TORCH_CHECK(storage.is_cpu() && storage.is_contiguous() && storage.dim() == 5, "commit_rows: storage must be contiguous");
  check(slots, ScalarType::Long, 1, "slots");
  check(start, ScalarType::Long, 1, "start");
  check(rows, ScalarType::Long, 2, "rows");
  const int64_t B = slots.size(0), A = rows.size(1), capacity = storage.size(3);
  STD_TORCH_CHECK(start.size(0) == B && rows.size(0) == B, "commit_rows: one path and start per slot expected");
  const auto *slot = read<int64_t>(slots), *first = read<int64_t>(start), *row = read<int64_t>(rows);
  for (int64_t b = 0; b < B; b++) {
    STD_TORCH_CHECK(slot[b] >= 0 && slot[b] < storage.size(1) && first[b] >= 0, "commit_rows: slot or start out of range");
    for (int64_t j = 0; j < A; j++)
      STD_TORCH_CHECK(row[b * A + j] >= 0 && first[b] + std::max(row[b * A + j], j) < capacity, "commit_rows: row out of range");
  }
  const int64_t bytes = storage.size(4) * static_cast<int64_t>(storage.element_size());
  const int64_t heads = storage.size(2);
  auto* base = static_cast<char*>(storage.mutable_data_ptr());
  std::vector<char> moved(A * bytes);
  for (int64_t b = 0; b < B; b++) {
    const int64_t* from = row + b * A;
    int64_t still = 0;  // rows that lie where they belong
    while (still < A && from[still] == still) still++;
    if (still == A) continue;
    for (int64_t plane = 0; plane < storage.size(0) * heads; plane++) {
      const int64_t layer = plane / heads, head = plane % heads;
      char* at = base + (((layer * storage.size(1) + slot[b]) * heads + head) * capacity + first[b]) * bytes;
      for (int64_t j = still; j < A; j++) std::memcpy(moved.data() + j * bytes, at + from[j] * bytes, bytes);
      std::memcpy(at + still * bytes, moved.data() + still * bytes, (A - still) * bytes);
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specblock, m) {
  m.def("accept_walk(Tensor logits, Tensor token, Tensor parent, Tensor noise, Tensor noise_row, Tensor temperature, "
        "Tensor top_p, Tensor top_k, Tensor min_p) -> (Tensor, Tensor, Tensor)");
  m.def("commit_rows(Tensor(a!) storage, Tensor slots, Tensor start, Tensor rows) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(specblock, CPU, m) {
  m.impl("accept_walk", TORCH_BOX(&accept_walk));
  m.impl("commit_rows", TORCH_BOX(&commit_rows));
}

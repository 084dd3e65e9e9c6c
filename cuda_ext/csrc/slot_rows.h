// A decoder layer over the slots of a cache, on raw rows: what the operations of one layer and of all layers are made of.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "layer_parts.h"

namespace specblock {

// Where the rows of B requests go in the slots of a cache: behind the `length` of each, as the last T of W rows, of which
// visible [B, T, W] says what each of them sees beside the whole prefix.
struct SlotPlaces {
  const int64_t *slot, *length;
  const bool* visible;
  int64_t B, T, W;

  SlotPlaces(const Tensor& slots, const Tensor& lengths, const Tensor& visible, int64_t B, int64_t T, int64_t num_slots,
             int64_t capacity)
      : B(B), T(T) {
    check(slots, ScalarType::Long, 1, "slots");
    check(lengths, ScalarType::Long, 1, "lengths");
    check(visible, ScalarType::Bool, 3, "visible");
    STD_TORCH_CHECK(slots.size(0) == B && lengths.size(0) == B, "one slot and length per request expected");
    STD_TORCH_CHECK(visible.size(0) == B && visible.size(1) == T && visible.size(2) >= T, "visible does not fit");
    W = visible.size(2);
    slot = read<int64_t>(slots);
    length = read<int64_t>(lengths);
    this->visible = read<bool>(visible);
    for (int64_t b = 0; b < B; b++)
      STD_TORCH_CHECK(slot[b] >= 0 && slot[b] < num_slots && length[b] >= 0 && length[b] + W <= capacity,
                      "slot or length out of range");
  }
};

// Keys and values of one layer, [S, G, C, D] with the strides of S, G and C.
struct SlotStorage {
  float *keys, *values;
  int64_t slot_stride, head_stride, row_stride, G, D;
};

// What the rows that ask see of their prefixes and of each other, themselves in any case, [B][A][length + W]; the same in
// every layer.
struct Seen {
  std::vector<std::unique_ptr<bool[]>> mask;
  std::vector<int64_t> asking;  // [B * A], numbers of rows in their own request
  int64_t A;

  Seen(const SlotPlaces& at, std::vector<int64_t> rows) : mask(at.B), asking(std::move(rows)) {
    A = at.B > 0 ? static_cast<int64_t>(asking.size()) / at.B : 0;
    for (int64_t b = 0; b < at.B; b++) {
      const int64_t total = at.length[b] + at.W;
      mask[b] = std::make_unique_for_overwrite<bool[]>(A * total);
      for (int64_t a = 0; a < A; a++) {
        std::fill_n(mask[b].get() + a * total, at.length[b], true);
        bool* cycle = mask[b].get() + a * total + at.length[b];
        std::copy_n(at.visible + (b * at.T + asking[b * A + a]) * at.W, at.W, cycle);
        cycle[at.W - at.T + asking[b * A + a]] = true;
      }
    }
  }
};

// Rows [B, T, G, D] of new keys and values into the storage.
inline void store(const SlotPlaces& at, const SlotStorage& to, const float* key, const float* value) {
  for (int64_t b = 0; b < at.B; b++)
    for (int64_t t = 0; t < at.T; t++)
      for (int64_t g = 0; g < to.G; g++) {
        const int64_t from = ((b * at.T + t) * to.G + g) * to.D, row = at.length[b] + at.W - at.T + t;
        const int64_t place = at.slot[b] * to.slot_stride + g * to.head_stride + row * to.row_stride;
        std::copy_n(key + from, to.D, to.keys + place);
        std::copy_n(value + from, to.D, to.values + place);
      }
}

// out[B, A, heads, D] of query [B, A, heads, D].
inline void attend(const SlotPlaces& at, const SlotStorage& from, const Seen& seen, const float* query, int64_t heads,
                   float scale, float* out) {
  const int64_t most = at.B > 0 ? *std::max_element(at.length, at.length + at.B) + at.W : 1;
  const int64_t group = heads / from.G, A = seen.A, D = from.D;
  const int64_t grain = kMultiplyAddsPerThread / (2 * group * std::max<int64_t>(A, 1) * most * D) + 1;
  torch::stable::parallel_for(0, at.B * from.G, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / from.G, g = i % from.G, first = b * A * heads * D + g * group * D;
      const int64_t place = at.slot[b] * from.slot_stride + g * from.head_stride;
      kernels().attend({
          .query = query + first, .query_head = D, .query_row = heads * D,
          .key = from.keys + place, .key_row = from.row_stride,
          .value = from.values + place, .value_row = from.row_stride,
          .mask = seen.mask[b].get(), .mask_row = at.length[b] + at.W,
          .out = out + first, .out_row = heads * D, .out_head = D,
          .heads = group, .rows = A, .T = at.length[b] + at.W, .D = D, .scale = scale,
      });
    }
  });
}

// Rotary tables [B or 1, T, D], by the row of x.
struct Turns {
  const float *cosine, *sine;
  std::vector<int64_t> rows, asked;  // of all rows, and of those that ask
  int64_t D;

  Turns(const Tensor& cos, const Tensor& sin, int64_t num_rows, const std::vector<int64_t>& asking)
      : cosine(read<float>(cos)), sine(read<float>(sin)), rows(table_rows(cos, num_rows)), asked(asking.size()), D(cos.size(2)) {
    for (size_t i = 0; i < asking.size(); i++) asked[i] = rows[asking[i]];
  }
};

// What comes before attention, checked to take rows of `inputs`.
struct Before {
  const float* norm;  // null: rows are normalised already
  float eps;
  const Tensor &query, &key, &value;
  int64_t query_out, key_out;
  const float *query_norm, *key_norm;
  float head_eps;
  bool coarse;

  void check_inputs(int64_t inputs) const {
    check_packed(query, inputs, query_out);
    check_packed(key, inputs, key_out);
    check_packed(value, inputs, key_out);
  }
};

inline std::vector<float> rows_at(const float* from, int64_t size, const std::vector<int64_t>& rows) {
  std::vector<float> taken(rows.size() * size);
  for (size_t i = 0; i < rows.size(); i++) std::copy_n(from + rows[i] * size, size, taken.data() + i * size);
  return taken;
}

// `to` = the layer of x [rows, inputs] and the residual stream [rows, K], of the rows that ask, whose numbers among all are
// `asking` (empty: all ask).
inline void run_layer(const Before& before, const Rest& rest, const SlotPlaces& at, const SlotStorage& storage,
                      const Seen& seen, const Turns& turns, const std::vector<int64_t>& asking, float scale, const float* x,
                      int64_t inputs, const float* residual, float* to) {
  const int64_t rows = at.B * at.T, count = static_cast<int64_t>(seen.asking.size());
  std::vector<float> normed, taken, stays, q(count * before.query_out), k(rows * before.key_out), v(rows * before.key_out);
  std::vector<float> mixed(count * before.query_out);
  if (before.norm != nullptr) {
    normed.resize(rows * inputs);
    kernels().normalise(x, before.norm, normed.data(), rows, inputs, before.eps);
    x = normed.data();
  }
  multiply(x, rows, before.key, k.data(), before.key_out, before.coarse);
  multiply(x, rows, before.value, v.data(), before.key_out, before.coarse);
  if (!asking.empty()) {
    taken = rows_at(x, inputs, asking);
    stays = rows_at(residual, rest.K, asking);
    residual = stays.data();
  }
  multiply(asking.empty() ? x : taken.data(), count, before.query, q.data(), before.query_out, before.coarse);
  turn(q.data(), count, before.query_out, turns.D, before.query_norm, before.head_eps, turns.cosine, turns.sine, turns.asked);
  turn(k.data(), rows, before.key_out, turns.D, before.key_norm, before.head_eps, turns.cosine, turns.sine, turns.rows);
  store(at, storage, k.data(), v.data());
  attend(at, storage, seen, q.data(), before.query_out / turns.D, scale, mixed.data());
  rest(residual, mixed.data(), count, to);
}

}  // namespace specblock

// Registers a whole decoder layer over the slots of a cache: norm, products, rotary embedding, writing keys and values,
// attention and SwiGLU. A cycle runs a dozen of these over a few rows, and each operation less is time that is no work.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "layer_parts.h"

namespace {

using namespace specblock;

// One layer of the cache, [S, G, C, D], and where the rows of B requests go: behind the `length` of each, as the last T
// of W rows, of which visible [B, T, W] says what each of them sees beside the whole prefix.
struct Slots {
  Tensor& keys;
  Tensor& values;
  const int64_t *slot, *length;
  const bool* visible;
  int64_t B, T, W, G, D;

  Slots(Tensor& keys, Tensor& values, const Tensor& slots, const Tensor& lengths, const Tensor& visible, int64_t B,
        int64_t T, int64_t key_out, int64_t D)
      : keys(keys), values(values), B(B), T(T), G(key_out / D), D(D) {
    for (const Tensor* t : {&keys, &values}) {
      STD_TORCH_CHECK(t->is_cpu() && t->dim() == 4 && t->scalar_type() == ScalarType::Float && t->stride(3) == 1,
                      "slot_layer: keys and values must be float32 [slots, heads, capacity, D] on the CPU");
      STD_TORCH_CHECK(t->size(0) == keys.size(0) && t->size(1) == G && t->size(2) == keys.size(2) && t->size(3) == D,
                      "slot_layer: keys and values do not fit the products");
    }
    check(slots, ScalarType::Long, 1, "slots");
    check(lengths, ScalarType::Long, 1, "lengths");
    check(visible, ScalarType::Bool, 3, "visible");
    STD_TORCH_CHECK(slots.size(0) == B && lengths.size(0) == B, "slot_layer: one slot and length per request expected");
    STD_TORCH_CHECK(visible.size(0) == B && visible.size(1) == T && visible.size(2) >= T, "slot_layer: visible does not fit");
    W = visible.size(2);
    slot = read<int64_t>(slots);
    length = read<int64_t>(lengths);
    this->visible = read<bool>(visible);
    for (int64_t b = 0; b < B; b++)
      STD_TORCH_CHECK(slot[b] >= 0 && slot[b] < keys.size(0) && length[b] >= 0 && length[b] + W <= keys.size(2),
                      "slot_layer: slot or length out of range");
  }

  // Rows [B, T, G, D] of new keys and values into the storage.
  void store(const float* key, const float* value) {
    auto *k = write<float>(keys), *v = write<float>(values);
    for (int64_t b = 0; b < B; b++)
      for (int64_t t = 0; t < T; t++)
        for (int64_t g = 0; g < G; g++) {
          const int64_t from = ((b * T + t) * G + g) * D, at = length[b] + W - T + t;
          std::copy_n(key + from, D, k + slot[b] * keys.stride(0) + g * keys.stride(1) + at * keys.stride(2));
          std::copy_n(value + from, D, v + slot[b] * values.stride(0) + g * values.stride(1) + at * values.stride(2));
        }
  }

  // out[B, A, heads, D] of query [B, A, heads, D], asked by the rows `asking` [B, A] of T.
  void attend(const float* query, const std::vector<int64_t>& asking, int64_t heads, float scale, float* out) const {
    const int64_t A = B > 0 ? static_cast<int64_t>(asking.size()) / B : 0;
    std::vector<std::unique_ptr<bool[]>> seen(B);
    for (int64_t b = 0; b < B; b++) {
      const int64_t total = length[b] + W;
      seen[b] = std::make_unique_for_overwrite<bool[]>(A * total);
      for (int64_t a = 0; a < A; a++) {
        std::fill_n(seen[b].get() + a * total, length[b], true);
        std::copy_n(visible + (b * T + asking[b * A + a]) * W, W, seen[b].get() + a * total + length[b]);
      }
    }
    const auto *k = read<float>(keys), *v = read<float>(values);
    const int64_t most = B > 0 ? *std::max_element(length, length + B) + W : 1, group = heads / G;
    const int64_t grain = kMultiplyAddsPerThread / (2 * group * std::max<int64_t>(A, 1) * most * D) + 1;
    torch::stable::parallel_for(0, B * G, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t b = i / G, g = i % G, at = b * A * heads * D + g * group * D;
        kernels().attend({
            .query = query + at, .query_head = D, .query_row = heads * D,
            .key = k + slot[b] * keys.stride(0) + g * keys.stride(1), .key_row = keys.stride(2),
            .value = v + slot[b] * values.stride(0) + g * values.stride(1), .value_row = values.stride(2),
            .mask = seen[b].get(), .mask_row = length[b] + W,
            .out = out + at, .out_row = heads * D, .out_head = D,
            .heads = group, .rows = A, .T = length[b] + W, .D = D, .scale = scale,
        });
      }
    });
  }
};

// The rows of x [B, T, ...] that ask, as numbers in their own request and in all of x; without `asking` all do.
struct Asking {
  std::vector<int64_t> own, whole;

  Asking(const std::optional<Tensor>& asking, int64_t B, int64_t T) {
    if (asking) {
      check(*asking, ScalarType::Long, 2, "asking");
      STD_TORCH_CHECK(asking->size(0) == B && asking->size(1) > 0, "slot_layer: asking must be [B, A]");
    }
    const int64_t A = asking ? asking->size(1) : T;
    for (int64_t i = 0; i < B * A; i++) {
      const int64_t row = asking ? read<int64_t>(*asking)[i] : i % A;
      STD_TORCH_CHECK(row >= 0 && row < T, "slot_layer: a row that asks is out of range");
      own.push_back(row);
      whole.push_back(i / A * T + row);
    }
  }

  std::vector<float> rows(const float* x, int64_t size) const {
    std::vector<float> taken(whole.size() * size);
    for (size_t i = 0; i < whole.size(); i++) std::copy_n(x + whole[i] * size, size, taken.data() + i * size);
    return taken;
  }
};

// x float32 [B, T, inputs], residual [B, T, K] (absent: x), asking [B, A] (absent: all rows) -> [B, A or T, K].
Tensor slot_layer(const Tensor& x, std::optional<Tensor> residual, std::optional<Tensor> norm, double eps,
                  const Tensor& query, const Tensor& key, const Tensor& value, int64_t query_out, int64_t key_out,
                  const Tensor& cos, const Tensor& sin, std::optional<Tensor> query_norm, std::optional<Tensor> key_norm,
                  double head_eps, Tensor keys, Tensor values, const Tensor& slots, const Tensor& lengths,
                  const Tensor& visible, std::optional<Tensor> asking, double scale, const Tensor& output,
                  const Tensor& after, double after_eps, const Tensor& gate, const Tensor& up, const Tensor& down,
                  int64_t inner, bool coarse) {
  check(x, ScalarType::Float, 3, "x");
  const Tensor& stream = residual ? *residual : x;
  check(stream, ScalarType::Float, 3, "residual");
  const int64_t B = x.size(0), T = x.size(1), inputs = x.size(2), K = stream.size(2), rows = B * T;
  STD_TORCH_CHECK(stream.size(0) == B && stream.size(1) == T, "slot_layer: the residual stream does not fit x");
  check_packed(query, inputs, query_out);
  check_packed(key, inputs, key_out);
  check_packed(value, inputs, key_out);
  check_tables(cos, sin, B, T, query_out, key_out);
  const int64_t D = cos.size(2);
  STD_TORCH_CHECK(D % 16 == 0 && key_out > 0 && query_out % key_out == 0, "slot_layer: heads do not fit each other");
  Slots cache(keys, values, slots, lengths, visible, B, T, key_out, D);
  const Asking who(asking, B, T);
  const Rest rest(output, after, after_eps, gate, up, down, inner, query_out, K, coarse);
  const int64_t count = static_cast<int64_t>(who.whole.size());
  Tensor out = torch::stable::empty({B, asking ? asking->size(1) : T, K}, ScalarType::Float);
  if (rows == 0) return out;

  std::vector<float> normed, q(count * query_out), k(rows * key_out), v(rows * key_out), mixed(count * query_out);
  const float* from = read<float>(x);
  if (norm) {
    normed.resize(rows * inputs);
    kernels().normalise(from, norm_of(*norm, inputs), normed.data(), rows, inputs, static_cast<float>(eps));
    from = normed.data();
  }
  multiply(from, rows, key, k.data(), key_out, coarse);
  multiply(from, rows, value, v.data(), key_out, coarse);
  const std::vector<float> taken = asking ? who.rows(from, inputs) : std::vector<float>();
  multiply(asking ? taken.data() : from, count, query, q.data(), query_out, coarse);
  const std::vector<int64_t> place = table_rows(cos, rows);
  std::vector<int64_t> asked(count);
  for (int64_t i = 0; i < count; i++) asked[i] = place[who.whole[i]];
  const float *cosine = read<float>(cos), *sine = read<float>(sin);
  const auto head_norm = [&](const std::optional<Tensor>& own) { return own ? norm_of(*own, D) : nullptr; };
  turn(q.data(), count, query_out, D, head_norm(query_norm), static_cast<float>(head_eps), cosine, sine, asked);
  turn(k.data(), rows, key_out, D, head_norm(key_norm), static_cast<float>(head_eps), cosine, sine, place);
  cache.store(k.data(), v.data());
  cache.attend(q.data(), who.own, query_out / D, static_cast<float>(scale), mixed.data());
  const std::vector<float> stays = asking ? who.rows(read<float>(stream), K) : std::vector<float>();
  rest(asking ? stays.data() : read<float>(stream), mixed.data(), count, write<float>(out));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specblock, m) {
  m.def("slot_layer(Tensor x, Tensor? residual, Tensor? norm, float eps, Tensor query, Tensor key, Tensor value, "
        "int query_out, int key_out, Tensor cos, Tensor sin, Tensor? query_norm, Tensor? key_norm, float head_eps, "
        "Tensor(a!) keys, Tensor(b!) values, Tensor slots, Tensor lengths, Tensor visible, Tensor? asking, float scale, "
        "Tensor output, Tensor after, float after_eps, Tensor gate, Tensor up, Tensor down, int inner, bool coarse=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(specblock, CPU, m) { m.impl("slot_layer", TORCH_BOX(&slot_layer)); }

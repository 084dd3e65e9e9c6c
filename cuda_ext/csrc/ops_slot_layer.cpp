// Registers decoder layers over the slots of a cache: norm, products, rotary embedding, writing keys and values, attention
// and SwiGLU of one, or of all layers of a model. A cycle runs a dozen over a few rows, and each operation less is time that
// is no work.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "slot_rows.h"

namespace {

using namespace specblock;

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
};

// The storage of layers [..., S, G, C, D], which has one or no dimension before these.
SlotStorage storage_of(Tensor& keys, Tensor& values, int64_t key_out, int64_t D) {
  const int64_t more = keys.dim() - 4;
  for (const Tensor* t : {&keys, &values}) {
    STD_TORCH_CHECK(t->is_cpu() && t->dim() == keys.dim() && t->scalar_type() == ScalarType::Float && t->stride(more + 3) == 1,
                    "keys and values must be float32 [slots, heads, capacity, D] on the CPU");
    for (int64_t i = 0; i < t->dim(); i++)
      STD_TORCH_CHECK(t->size(i) == keys.size(i) && t->stride(i) == keys.stride(i), "keys and values do not fit each other");
  }
  const int64_t G = key_out / D;
  STD_TORCH_CHECK(keys.size(more + 1) == G && keys.size(more + 3) == D, "keys and values do not fit the products");
  return {write<float>(keys), write<float>(values), keys.stride(more), keys.stride(more + 1), keys.stride(more + 2), G, D};
}

void check_heads(const Tensor& cos, int64_t query_out, int64_t key_out) {
  STD_TORCH_CHECK(cos.size(2) % 16 == 0 && key_out > 0 && query_out % key_out == 0, "heads do not fit each other");
}

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
  const int64_t B = x.size(0), T = x.size(1), inputs = x.size(2), K = stream.size(2);
  STD_TORCH_CHECK(stream.size(0) == B && stream.size(1) == T, "slot_layer: the residual stream does not fit x");
  check_tables(cos, sin, B, T, query_out, key_out);
  check_heads(cos, query_out, key_out);
  const int64_t D = cos.size(2);
  const auto head_norm = [&](const std::optional<Tensor>& own) { return own ? norm_of(*own, D) : nullptr; };
  const Before before{norm ? norm_of(*norm, inputs) : nullptr, static_cast<float>(eps), query, key, value, query_out, key_out,
                      head_norm(query_norm), head_norm(key_norm), static_cast<float>(head_eps), coarse};
  before.check_inputs(inputs);
  STD_TORCH_CHECK(keys.dim() == 4, "slot_layer: keys must be [slots, heads, capacity, D]");
  const SlotStorage storage = storage_of(keys, values, key_out, D);
  const SlotPlaces at(slots, lengths, visible, B, T, keys.size(0), keys.size(2));
  const Asking who(asking, B, T);
  const Rest rest(output, after, after_eps, gate, up, down, inner, query_out, K, coarse);
  Tensor out = torch::stable::empty({B, asking ? asking->size(1) : T, K}, ScalarType::Float);
  if (B * T == 0) return out;
  run_layer(before, rest, at, storage, Seen(at, who.own), Turns(cos, sin, B * T, who.whole),
            asking ? who.whole : std::vector<int64_t>(), static_cast<float>(scale), read<float>(x), inputs,
            read<float>(stream), write<float>(out));
  return out;
}

// Rows of the residual stream beside those of the slot before them in the same position (of the first slot: itself).
std::vector<float> beside_left(const std::vector<float>& stream, int64_t rows, int64_t K, int64_t slots) {
  std::vector<float> pairs(rows * 2 * K);
  for (int64_t row = 0; row < rows; row++) {
    const int64_t left = row % slots == 0 ? row : row - 1;
    std::copy_n(stream.data() + row * K, K, pairs.data() + row * 2 * K);
    std::copy_n(stream.data() + left * K, K, pairs.data() + row * 2 * K + K);
  }
  return pairs;
}

// All layers of a model, x float32 [B, T, K] -> [B, A or T, K], and the streams after the layers `kept` side by side,
// [B, T, kept * K]. `weights` are those of one layer after the other: norm, query, key, value, the norms of query and key
// heads if there are any, output, second norm, gate, up, down. Keys and values are [layers, S, G, C, D]. With `shifts`, one
// between two layers, rows of `slots` slots per position go on as shift([row; row of the slot before]). In the last layer
// only the rows `asking` [B, A] ask (absent: all).
std::tuple<Tensor, Tensor> slot_layers(const Tensor& x, std::vector<Tensor> weights, bool head_norms, double eps,
                                       int64_t query_out, int64_t key_out, const Tensor& cos, const Tensor& sin,
                                       double head_eps, Tensor keys, Tensor values, const Tensor& slots,
                                       const Tensor& lengths, const Tensor& visible, double scale, double after_eps,
                                       int64_t inner, bool coarse, std::vector<int64_t> kept, std::vector<Tensor> shifts,
                                       int64_t width, std::optional<Tensor> asking) {
  check(x, ScalarType::Float, 3, "x");
  const int64_t B = x.size(0), T = x.size(1), K = x.size(2), rows = B * T, each = head_norms ? 11 : 9;
  STD_TORCH_CHECK(keys.dim() == 5, "slot_layers: keys must be [layers, slots, heads, capacity, D]");
  const int64_t layers = keys.size(0);
  STD_TORCH_CHECK(static_cast<int64_t>(weights.size()) == layers * each, "slot_layers: the weights do not fit the layers of the cache");
  for (size_t i = 0; i < kept.size(); i++)
    STD_TORCH_CHECK(kept[i] >= 0 && kept[i] < layers, "slot_layers: a layer to keep is out of range");
  STD_TORCH_CHECK(!asking || kept.empty(), "slot_layers: either some rows ask or layers are kept");
  STD_TORCH_CHECK(shifts.empty() || (static_cast<int64_t>(shifts.size()) == layers - 1 && width > 0 && T % width == 0),
                  "slot_layers: shifts do not fit the layers or the rows");
  for (const Tensor& shift : shifts) check_packed(shift, 2 * K, K);
  check_tables(cos, sin, B, T, query_out, key_out);
  check_heads(cos, query_out, key_out);
  const int64_t D = cos.size(2);
  SlotStorage storage = storage_of(keys, values, key_out, D);
  const SlotPlaces at(slots, lengths, visible, B, T, keys.size(1), keys.size(3));
  const Asking who(asking, B, T), everyone(std::nullopt, B, T);
  const int64_t num_kept = static_cast<int64_t>(kept.size());
  Tensor out = torch::stable::empty({B, asking ? asking->size(1) : T, K}, ScalarType::Float);
  Tensor features = torch::stable::empty({B, T, num_kept * K}, ScalarType::Float);
  const auto narrow = [](double value) { return static_cast<float>(value); };
  std::vector<Before> before;
  std::vector<Rest> rest;  // all are checked before anything is written
  for (int64_t layer = 0; layer < layers; layer++) {
    const Tensor* w = weights.data() + layer * each;
    const Tensor* own = w + 4 + (head_norms ? 2 : 0);
    before.push_back({norm_of(w[0], K), narrow(eps), w[1], w[2], w[3], query_out, key_out, head_norms ? norm_of(w[4], D) : nullptr,
                      head_norms ? norm_of(w[5], D) : nullptr, narrow(head_eps), coarse});
    before.back().check_inputs(K);
    rest.emplace_back(own[0], own[1], after_eps, own[2], own[3], own[4], inner, query_out, K, coarse);
  }
  if (rows == 0) return {out, features};
  const Seen seen(at, everyone.own);
  const Turns turns(cos, sin, rows, everyone.whole);
  std::vector<float> stream(read<float>(x), read<float>(x) + rows * K), next(rows * K);
  for (int64_t layer = 0; layer < layers; layer++) {
    if (layer + 1 == layers && asking) {
      run_layer(before[layer], rest[layer], at, storage, Seen(at, who.own), Turns(cos, sin, rows, who.whole), who.whole,
                narrow(scale), stream.data(), K, stream.data(), write<float>(out));
      return {out, features};
    }
    run_layer(before[layer], rest[layer], at, storage, seen, turns, {}, narrow(scale), stream.data(), K, stream.data(), next.data());
    stream.swap(next);
    for (int64_t i = 0; i < num_kept; i++)
      if (kept[i] == layer)
        for (int64_t row = 0; row < rows; row++)
          std::copy_n(stream.data() + row * K, K, write<float>(features) + (row * num_kept + i) * K);
    if (!shifts.empty() && layer + 1 < layers) {
      multiply(beside_left(stream, rows, K, width).data(), rows, shifts[layer], next.data(), K, coarse);
      stream.swap(next);
    }
    storage.keys += keys.stride(0);
    storage.values += values.stride(0);
  }
  std::copy_n(stream.data(), rows * K, write<float>(out));
  return {out, features};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specblock, m) {
  m.def("slot_layer(Tensor x, Tensor? residual, Tensor? norm, float eps, Tensor query, Tensor key, Tensor value, "
        "int query_out, int key_out, Tensor cos, Tensor sin, Tensor? query_norm, Tensor? key_norm, float head_eps, "
        "Tensor(a!) keys, Tensor(b!) values, Tensor slots, Tensor lengths, Tensor visible, Tensor? asking, float scale, "
        "Tensor output, Tensor after, float after_eps, Tensor gate, Tensor up, Tensor down, int inner, bool coarse=False) -> Tensor");
  m.def("slot_layers(Tensor x, Tensor[] weights, bool head_norms, float eps, int query_out, int key_out, Tensor cos, "
        "Tensor sin, float head_eps, Tensor(a!) keys, Tensor(b!) values, Tensor slots, Tensor lengths, Tensor visible, "
        "float scale, float after_eps, int inner, bool coarse, int[] kept, Tensor[] shifts, int width, Tensor? asking) -> "
        "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(specblock, CPU, m) {
  m.impl("slot_layer", TORCH_BOX(&slot_layer));
  m.impl("slot_layers", TORCH_BOX(&slot_layers));
}

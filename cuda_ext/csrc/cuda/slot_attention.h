// What the kernels of slot attention are given, and how they share out the work. No CUDA and no PyTorch in here.
//
// All rows and heads that share a key/value head are the M = R * H / G query rows of one stream of keys, which is cut
// into splits. Each split leaves an unnormalised mixture and the peak and sum of its weights; combine joins them.
//
// In bfloat16 and half there are only as many splits as fill the device, for each costs a mixture of every row, written
// and read again: one where the batch fills it alone, whose result is written at once. Each request's own keys are cut
// evenly, so all blocks have as much to do however long its slot is. A row's rounding thus depends on the batch, as it
// does in the matrix products around.
//
// In float32 a row is computed from its own query, the keys it sees and the capacity of the cache, in an order that
// depends on nothing else. Splits are cut at fixed positions, every tile of query rows walks the keys in the same
// steps, and a hidden key or an empty split contributes exactly nothing. So a row has the same bits alone, in a batch,
// in another slot, and with more rows beside it.
#pragma once

#include <cstdint>

namespace specblock {

constexpr int kSplitStep = 64;   // keys per step; splits are whole steps
constexpr int kMaxSplits = 32;   // enough for one request to fill a device; bounds the workspace, so many mixtures per row
constexpr int kMinSplit = 256;   // less work than this is not worth a mixture of its own; in float32
constexpr int kShortSplit = 128;  // nor this on tensor cores, where the device would idle;
constexpr int kLongSplit = 512;   // nor this where it is busy

enum class SlotType : int { kBfloat16, kHalf, kFloat };

struct SlotAttention {
  const void *query, *key, *value;  // [B, H, R, D], [S, G, C, D] twice, at the strides below (in elements)
  int64_t query_batch, query_head, query_row;
  int64_t key_slot, key_head, key_row;
  int64_t value_slot, value_head, value_row;
  const int64_t *slots, *lengths;  // [B]
  const bool* visible;             // [B, R, R]
  void* out;                       // [B, R, H, D]
  float* mixture;                  // [B * G, splits, M, D]; this and the next are not used where `out` is written at once
  float* peak;                     // [B * G, splits, M, 2]: largest score, or -inf of an empty split; sum of weights
  int64_t num_slots, capacity;
  int B, H, G, R, D, splits;
  int split_tokens;      // 0: each request's keys are cut evenly
  float scale_log2;      // times log2(e): weights are powers of two
  bool query_is_aligned;  // rows of the query may be read 16 bytes at a time
  SlotType type;
};

// In float32.
inline int64_t slot_split_tokens(int64_t capacity) {
  const int64_t even = (capacity + kMaxSplits - 1) / kMaxSplits;
  const int64_t whole = (even + kSplitStep - 1) / kSplitStep * kSplitStep;
  return whole < kMinSplit ? kMinSplit : whole;
}

inline int64_t slot_splits(int64_t capacity) {
  const int64_t tokens = slot_split_tokens(capacity);
  return (capacity + tokens - 1) / tokens;
}

// How many splits launch_slot_tiles should be given; looks at shapes, capacity and type, and at the device in use.
int slot_tile_splits(const SlotAttention& a);

// Each starts its kernel on a stream and returns the message of a failed launch, or null.
const char* launch_slot_tiles(const SlotAttention& a, void* stream);        // bfloat16 and half; writes `out` where splits == 1
const char* launch_slot_tiles_float(const SlotAttention& a, void* stream);  // float32
const char* launch_slot_combine(const SlotAttention& a, void* stream);

}  // namespace specblock

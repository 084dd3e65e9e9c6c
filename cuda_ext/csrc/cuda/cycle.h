// The kernels of a cycle beside its forwards, as the bindings call them: device pointers, all contiguous unless a stride is
// given. Each returns the message of a failed launch, or null. What a CPU operation refuses because an index is out of
// range cannot be refused here without waiting for the device: such an index never addresses memory, see each kernel.
#pragma once

#include <cstdint>

namespace specblock {

enum class LogitType : int { kFloat, kDouble, kBfloat16, kHalf };

// Logits [rows][vocab_size] and the laws of their choice: one per row, or per request.
struct ChoiceInputs {
  const void* logits;
  LogitType type;
  int64_t vocab_size;
  const double* noise;  // [noise_rows][noise_size]
  int64_t noise_rows, noise_size;
  const int64_t* noise_row;  // clamped into the noise
  const double *temperature, *top_p, *min_p;
  const int64_t* top_k;
};

struct WalkInputs {
  const int64_t *token, *parent;  // [requests][rows]
  int64_t requests, rows, levels;
  int64_t *tokens, *path, *count;  // [requests][levels] twice, [requests]
};

struct CommitInputs {
  void* storage;  // [layers][slots][heads][capacity][row_bytes]
  int64_t layers, slots, heads, capacity, row_bytes;
  const int64_t *slot, *start, *row;  // [requests], [requests], [requests][moved] with row_stride
  int64_t requests, moved, row_stride;
};

// Greedy chains and alternatives: n leaves of K slots and W ranks for each request.
struct ExpandInputs {
  const int64_t *fan_out, *leaf_node, *leaf_depth;
  const float *log_prob, *leaf_score;
  const bool* leaf_valid;
  int64_t requests, leaves, slots, width, offset, block;
  int64_t *parent, *depth, *blocks, *slot, *rank;
  float* score;
  bool* valid;
};

constexpr int64_t kMostFollowers = 64;

// Proposals of n leaves of K slots and W (at most kMostFollowers) ranks for each request; see ../pair_gains.h.
struct FollowInputs {
  const int64_t* token;
  const float* log_prob;
  const double* temperature;  // [requests]
  int64_t requests, leaves, slots, width;
  bool noisy;
  double weight, scale;
  int64_t* to_token;
  float* to_log_prob;
};

struct PairGains;

constexpr int64_t kMostCandidates = 2048;

// Candidates [requests][size] into trees of keep + 1 rows. A parent that does not precede its child counts as the root.
struct GrowInputs {
  const int64_t *root_token, *token, *parent, *depth, *block, *slot;
  const float* score;
  const bool* valid;
  int64_t requests, size, keep;
  bool merge;
  int64_t *to_token, *to_parent, *to_depth, *to_block, *to_slot, *to_size, *parent_row;
  float* to_score;
};

constexpr int64_t kMostWanted = 128;

// The best tokens of draft logits [rows][vocab_size]. Noise rows and ids are clamped into the noise.
struct TopInputs {
  const void* logits;
  LogitType type;
  int64_t rows, vocab_size;
  const double* noise;  // [noise_rows][noise_size], or null
  int64_t noise_rows, noise_size;
  const int64_t *noise_row, *ids;  // [rows]; [vocab_size] or null
  const double *temperature, *top_p, *min_p;
  const int64_t* top_k;
  double scale;
  int64_t width, num_top;  // at most kMostWanted
  int64_t* token;
  float *log_prob, *top;
};

extern "C" {
const char* specblock_cuda_philox(const int64_t* seed, const int64_t* choice, const int64_t* position, double* out, int64_t rows,
                                  int64_t vocab_size, void* stream);
const char* specblock_cuda_choose(const ChoiceInputs* inputs, int64_t rows, int64_t* out, void* stream);
const char* specblock_cuda_accept_walk(const ChoiceInputs* inputs, const WalkInputs* walk, void* stream);
const char* specblock_cuda_commit_rows(const CommitInputs* inputs, void* stream);
const char* specblock_cuda_draft_top(const TopInputs* inputs, void* stream);
const char* specblock_cuda_expand_chain(const ExpandInputs* inputs, void* stream);
const char* specblock_cuda_grow_tree(const GrowInputs* inputs, void* stream);
const char* specblock_cuda_follow_chain(const FollowInputs* inputs, const PairGains* known, void* stream);
}

}  // namespace specblock

// What a drafter proposes at one slot: its best tokens, ranked by the target's own noise; draft_top.h is the same on one
// core. A team selects by keys that hold the score and, behind it, the index, so that no two are equal.
#include "cycle.h"
#include "keys.cuh"
#include "team.cuh"

namespace specblock {
namespace {

constexpr int kThreads = 512;
constexpr int kMost = kMostWanted;

struct Selection {
  unsigned long long found[kMost], sorted[kMost], list[kMost];  // of this block; of the team, best first
  int count;
};

struct TopShared {
  TeamShared team;
  Selection selection[2];  // by the logits, by the score
};

__device__ __forceinline__ float value_at(unsigned long long key) { return value_of(static_cast<uint32_t>(key >> 32)); }
__device__ __forceinline__ int64_t index_at(unsigned long long key) { return ~static_cast<uint32_t>(key); }

template <class Logit>
class TeamTop {
 public:
  __device__ TeamTop(TopShared& shared, const TopInputs& in, int64_t row)
      : shared_(shared), team_(shared.team), in_(in), row_(row),
        logits_(static_cast<const Logit*>(in.logits) + row * in.vocab_size),
        noisy_(in.noise != nullptr && in.temperature[row] > 0),
        temperature_(noisy_ ? static_cast<float>(in.temperature[row]) : 1.0f), scale_(static_cast<float>(in.scale)) {
    if (noisy_) noise_ = in.noise + min(max(in.noise_row[row], int64_t{0}), in.noise_rows - 1) * in.noise_size;
  }

  __device__ void find() {
    const auto num_top = static_cast<int>(in_.num_top), width = static_cast<int>(in_.width);
    const bool again = noisy_ || width > num_top;  // otherwise the best logits are the best
    select(0, num_top, [&](int64_t i) { return logit(i); });
    const unsigned long long* top = shared_.selection[0].sorted;
    const bool writes = team_block() == 0;
    for (int t = threadIdx.x; writes && t < num_top; t += blockDim.x) in_.top[row_ * num_top + t] = value_at(top[t]);
    if (noisy_) floor_ = filter_floor(top, num_top, log_sum_exp(value_at(top[0]) / temperature_, [&](int64_t i) { return scaled(i); }));
    if (again) select(1, width, [&](int64_t i) { return score(i); });
    const unsigned long long* best = again ? shared_.selection[1].sorted : top;
    const float normaliser = log_sum_exp(value_at(best[0]), [&](int64_t i) { return score(i); });
    for (int t = threadIdx.x; writes && t < width; t += blockDim.x) {
      in_.token[row_ * width + t] = index_at(best[t]);
      in_.log_prob[row_ * width + t] = value_at(best[t]) - normaliser;
    }
    team_.leave();
  }

 private:
  __device__ __forceinline__ float logit(int64_t i) const { return static_cast<float>(logits_[i]); }
  __device__ __forceinline__ float scaled(int64_t i) const { return logit(i) / temperature_; }

  __device__ __forceinline__ float score(int64_t i) const {
    if (!noisy_) return logit(i);
    const float value = scaled(i);
    if (value < floor_) return -INFINITY;
    const int64_t at = in_.ids == nullptr ? i : min(max(in_.ids[i], int64_t{0}), in_.noise_size - 1);
    return (value + static_cast<float>(noise_[at])) / scale_;
  }

  // The `count` best of value_of(i), of equal ones the lower index first, into every block's selection `which`.
  template <class ValueOf>
  __device__ void select(int which, int count, ValueOf value) {
    Selection& mine = shared_.selection[which];
    const auto key = [&](int64_t i) {
      const float v = value(i);
      return static_cast<unsigned long long>(ordered_key(v == 0 ? 0.0f : v)) << 32 | ~static_cast<uint32_t>(i);
    };
    if (threadIdx.x == 0) mine.count = 0;
    const unsigned long long least = team_.largest_key<unsigned long long, false>(in_.vocab_size, count, key);
    for (int64_t i = team_.first(); i < in_.vocab_size; i += team_.stride()) {
      const unsigned long long own = key(i);
      if (own < least) continue;
      const int place = atomicAdd(&mine.count, 1);
      if (place < kMost) mine.found[place] = own;
    }
    team_barrier();
    int from = 0;  // where this block of the team begins in the list
    for (int block = 0; block < team_blocks(); block++) {
      const Selection* other = of_block(&mine, block);
      const int held = min(other->count, count - from);
      for (int t = threadIdx.x; t < held; t += blockDim.x) mine.list[from + t] = other->found[t];
      from += held;
    }
    __syncthreads();
    for (int t = threadIdx.x; t < from; t += blockDim.x) {
      int better = 0;
      for (int other = 0; other < from; other++) better += mine.list[other] > mine.list[t];
      mine.sorted[better] = mine.list[t];
    }
    __syncthreads();
  }

  template <class ValueOf>
  __device__ float log_sum_exp(float largest, ValueOf value) {
    double own = 0;
    for (int64_t i = team_.first(); i < in_.vocab_size; i += team_.stride()) own += static_cast<double>(expf(value(i) - largest));
    own = team_.reduce(own, 0.0, [](double a, double b) { return a + b; });
    return largest + logf(static_cast<float>(own));
  }

  // The smallest logit (after temperature) that the request's top-k, top-p and min-p surely leave.
  __device__ float filter_floor(const unsigned long long* top, int num_top, float normaliser) const {
    const auto top_p = static_cast<float>(in_.top_p[row_]);
    const int64_t top_k = in_.top_k[row_];
    const float first = value_at(top[0]) / temperature_;
    float floor = -INFINITY, mass = 0, least = first;
    bool all = true;
    for (int t = 0; t < num_top; t++) {
      const float value = value_at(top[t]) / temperature_;
      if (in_.top_p[row_] >= 1 || mass < top_p) least = value;
      else all = false;
      mass += expf(value - normaliser);
    }
    if (!all) floor = least;
    floor = fmaxf(floor, first + logf(static_cast<float>(in_.min_p[row_])));
    if (top_k > 0 && top_k <= num_top) floor = fmaxf(floor, value_at(top[top_k - 1]) / temperature_);
    return floor;
  }

  TopShared& shared_;
  Team team_;
  const TopInputs& in_;
  const int64_t row_;
  const Logit* logits_;
  const bool noisy_;
  const float temperature_, scale_;
  const double* noise_ = nullptr;
  float floor_ = -INFINITY;
};

template <class Logit>
__global__ void __launch_bounds__(kThreads) top_kernel(const TopInputs in) {
  TeamTop<Logit>(*reinterpret_cast<TopShared*>(shared_bytes), in, blockIdx.x / team_blocks()).find();
}

template <class Logit>
const char* draft_top(const TopInputs& in, void* stream) {
  return launch_teams<top_kernel<Logit>>({in.rows, in.vocab_size, kThreads, sizeof(TopShared), stream}, in);
}

}  // namespace
}  // namespace specblock

extern "C" const char* specblock_cuda_draft_top(const specblock::TopInputs* inputs, void* stream) {
  using namespace specblock;
  if (inputs->rows == 0) return nullptr;
  switch (inputs->type) {
    case LogitType::kFloat: return draft_top<float>(*inputs, stream);
    case LogitType::kBfloat16: return draft_top<__nv_bfloat16>(*inputs, stream);
    case LogitType::kHalf: return draft_top<__half>(*inputs, stream);
    default: return "float64 logits are not served";
  }
}

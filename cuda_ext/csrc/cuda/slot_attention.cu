// Slot attention in bfloat16 and half on tensor cores; slot_attention.h says how the work is shared out.
//
// A warp owns 16 or 32 query rows: scores, weights and mixture stay in its registers, keys and values come through
// shared memory, two tiles deep. What hides keys is looked up only in the tiles that hold new rows.
#include <algorithm>

#include "launch.h"
#include "slot_attention.cuh"
#include "tensor_core.cuh"

namespace specblock {
namespace {

constexpr int kTile = kSplitStep;  // keys in shared memory at once, per buffer, and per update of the running maximum

template <class T>
__device__ inline uint4 read_8(const T* from) {
  const auto* half = reinterpret_cast<const uint16_t*>(from);
  uint32_t word[4];
  for (int i = 0; i < 4; i++) word[i] = half[2 * i] | static_cast<uint32_t>(half[2 * i + 1]) << 16;
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// The block's query rows on their way to `query`, [Rows][D] in shared memory; zeros behind the last.
template <class T, int D, int Rows>
__device__ inline void fetch_query(unsigned char* query, const SlotAttention& a, int first_row) {
  constexpr int kChunks = D / 8;
  const uint32_t shared = shared_address(query);
#pragma unroll 4
  for (int i = threadIdx.x; i < Rows * kChunks; i += blockDim.x) {
    const int row = i / kChunks, chunk = i % kChunks, m = first_row + row;
    const bool wanted = m < SlotPart::rows(a);
    const T* const from = static_cast<const T*>(a.query) + SlotPart::query_offset(a, wanted ? m : 0) + chunk * 8;
    if (a.query_is_aligned)
      copy_16(shared + place<D>(row, chunk), from, wanted);
    else
      *reinterpret_cast<uint4*>(query + place<D>(row, chunk)) = wanted ? read_8(from) : make_uint4(0, 0, 0, 0);
  }
}

// Of each new row that the block's query rows belong to, from the first on: bit t tells whether it must not use key
// `first` + t of the tile. A warp looks at 32 keys of several new rows together, so that their latencies overlap.
template <int Rows, int Warps>
__device__ inline void find_hidden(uint2* hidden, const SlotAttention& a, const SlotPart& part, int first_row, int first) {
  constexpr int kTogether = 4;
  const int lane = threadIdx.x % 32, heads = a.H / a.G;
  const int begin = first_row / heads, end = min((first_row + Rows - 1) / heads + 1, a.R);
  for (int row = begin + static_cast<int>(threadIdx.x / 32); row < end; row += Warps * kTogether) {
    bool unseen[kTogether][2];
#pragma unroll
    for (int j = 0; j < kTogether; j++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int key = first + half * 32 + lane - part.length;  // among the new ones
        const bool seen = part.visible(a, min(row + j * Warps, end - 1) * heads)[min(max(key, 0), a.R - 1)];
        unseen[j][half] = key >= a.R || (key >= 0 && !seen);
      }
#pragma unroll
    for (int j = 0; j < kTogether; j++) {
      const uint32_t low = __ballot_sync(0xffffffffu, unseen[j][0]), high = __ballot_sync(0xffffffffu, unseen[j][1]);
      if (lane == 0 && row + j * Warps < end) hidden[row + j * Warps - begin] = make_uint2(low, high);
    }
  }
}

// One warp's 16 * Frags query rows on their way through the keys.
template <class T, int D, int Frags>
struct WarpRows {
  float mixture[Frags][D / 8][4] = {};
  float top[Frags][2], sum[Frags][2];
  uint32_t held[D / 16][4];  // the query's fragments where there is room for them, with Frags == 1
  int lane;

  __device__ WarpRows() : lane(threadIdx.x % 32) {
    for (int f = 0; f < Frags; f++)
      for (int i = 0; i < 2; i++) top[f][i] = -INFINITY, sum[f][i] = 0.0f;
  }

  // The warp's row that this lane's values i = 0, 1 (columns 0, 1 and 2, 3 of a fragment) belong to.
  __device__ int row(int f, int i) const { return f * 16 + i * 8 + lane / 4; }

  __device__ uint32_t query_lane(uint32_t query) const { return query + place<D>(lane % 16, lane / 16); }

  __device__ void hold(uint32_t query) {
    if constexpr (Frags == 1)
#pragma unroll
      for (int d = 0; d < D / 16; d++) load_matrices(held[d], query_lane(query) ^ (d * 32));
  }

  // scores[f][n] = the products of the warp's rows with keys 8 n .. 8 n + 7 of the tile.
  __device__ void score(float (&scores)[Frags][kTile / 8][4], uint32_t query, uint32_t key) const {
    const uint32_t key_lane = key + place<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int f = 0; f < Frags; f++)
#pragma unroll
      for (int n = 0; n < kTile / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) scores[f][n][e] = 0.0f;
#pragma unroll
    for (int d = 0; d < D / 16; d++) {
      uint32_t q[Frags][4];
#pragma unroll
      for (int f = 0; f < Frags; f++) {
        if constexpr (Frags == 1) {
#pragma unroll
          for (int j = 0; j < 4; j++) q[f][j] = held[d][j];
        } else {
          load_matrices(q[f], (query_lane(query) ^ (d * 32)) + f * 16 * D * 2);
        }
      }
#pragma unroll
      for (int n = 0; n < kTile / 16; n++) {
        uint32_t k[4];
        load_matrices(k, (key_lane ^ (d * 32)) + n * 16 * D * 2);
#pragma unroll
        for (int f = 0; f < Frags; f++) {
          multiply(scores[f][2 * n], q[f], k[0], k[1], T());
          multiply(scores[f][2 * n + 1], q[f], k[2], k[3], T());
        }
      }
    }
  }

  // `hidden`: what find_hidden found.
  __device__ void hide(float (&scores)[Frags][kTile / 8][4], const uint2* hidden, const SlotAttention& a, int first_row,
                       int warp_row) const {
#pragma unroll
    for (int f = 0; f < Frags; f++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int m = first_row + warp_row + row(f, i);
        asm volatile("" : "+r"(m));  // or what follows from it would be held in registers all along
        const int heads = a.H / a.G;
        const uint2 both = hidden[min(m / heads, a.R - 1) - first_row / heads];
        const uint32_t mine[2] = {both.x >> (lane % 4 * 2), both.y >> (lane % 4 * 2)};
#pragma unroll
        for (int n = 0; n < kTile / 8; n++)
#pragma unroll
          for (int e = 0; e < 2; e++)
            if (mine[n / 4] >> (n % 4 * 8 + e) & 1) scores[f][n][2 * i + e] = -INFINITY;
      }
  }

  // Scores become weights, relative to a new running maximum; what was mixed so far is brought down to it.
  __device__ void weigh(float (&scores)[Frags][kTile / 8][4], float scale_log2) {
    float shrink[Frags][2];
    bool moved = false;
#pragma unroll
    for (int f = 0; f < Frags; f++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float most = top[f][i];
#pragma unroll
        for (int n = 0; n < kTile / 8; n++) most = fmaxf(most, fmaxf(scores[f][n][2 * i], scores[f][n][2 * i + 1]));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        // A row that has seen nothing yet has no maximum: weights 2^(-inf - 0), not 2^(-inf + inf).
        const float base = most == -INFINITY ? 0.0f : most;
        shrink[f][i] = power_of_two(__fmul_rn(__fsub_rn(top[f][i], base), scale_log2));
        moved |= shrink[f][i] != 1.0f;
        const float offset = __fmul_rn(base, -scale_log2);
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < kTile / 8; n++)
#pragma unroll
          for (int e = 2 * i; e < 2 * i + 2; e++) {
            scores[f][n][e] = power_of_two(__fmaf_rn(scores[f][n][e], scale_log2, offset));
            total = __fadd_rn(total, scores[f][n][e]);
          }
        top[f][i] = most;
        sum[f][i] = __fmaf_rn(sum[f][i], shrink[f][i], total);  // of this lane's columns
      }
    if (!__any_sync(0xffffffffu, moved)) return;  // mostly so, after the first few tiles
#pragma unroll
    for (int f = 0; f < Frags; f++)
#pragma unroll
      for (int n = 0; n < D / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) mixture[f][n][e] = __fmul_rn(mixture[f][n][e], shrink[f][e / 2]);
  }

  // mixture += weights times the values of the tile.
  __device__ void mix(const float (&weights)[Frags][kTile / 8][4], uint32_t value) {
    const uint32_t value_lane = value + place<D>(lane % 16, lane / 16);
#pragma unroll
    for (int n = 0; n < kTile / 16; n++) {
      uint32_t w[Frags][4];
#pragma unroll
      for (int f = 0; f < Frags; f++)
#pragma unroll
        for (int j = 0; j < 4; j++)
          w[f][j] = pack(weights[f][2 * n + j / 2][j % 2 * 2], weights[f][2 * n + j / 2][j % 2 * 2 + 1], T());
#pragma unroll
      for (int d = 0; d < D / 16; d++) {
        uint32_t v[4];
        load_transposed(v, (value_lane ^ (d * 32)) + n * 16 * D * 2);
#pragma unroll
        for (int f = 0; f < Frags; f++) {
          multiply(mixture[f][2 * d], w[f], v[0], v[1], T());
          multiply(mixture[f][2 * d + 1], w[f], v[2], v[3], T());
        }
      }
    }
  }
};

template <class T, int D, int Warps, int Frags>
constexpr int shared_bytes() {
  constexpr int kRows = Warps * Frags * 16;
  return (kRows + 4 * kTile) * D * static_cast<int>(sizeof(T)) + kRows * static_cast<int>(sizeof(uint2));
}

template <class T, int D, int Warps, int Frags>
__global__ void __launch_bounds__(Warps * 32, 1) attend(const SlotAttention a) {
  constexpr int kRows = Warps * Frags * 16, kChunks = D / 8, kPerPass = Warps * 32 / kChunks;
  static_assert(kTile % kPerPass == 0);
  constexpr uint32_t kTileBytes = kTile * D * 2;
  extern __shared__ __align__(1024) unsigned char memory[];
  unsigned char* const query = memory;            // [kRows][D]
  const uint32_t keys = shared_address(memory) + kRows * D * 2;  // [2][kTile][D]
  const uint32_t values = keys + 2 * kTileBytes;  // [2][kTile][D]
  uint2* const hidden = reinterpret_cast<uint2*>(memory + kRows * D * 2 + 4 * kTileBytes);  // [kRows]

  const SlotPart part(a);
  const int first_row = blockIdx.x * kRows;
  if (part.begin >= part.end && a.splits > 1) {
    part.leave_empty(a, first_row, kRows);
    return;
  }
  const int slot = static_cast<int>(part.slot(a)), group = part.group(a);
  const auto fetch = [&](int tile) {
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // or all that follows from it would be held in registers all along
    const int chunk = thread % kChunks, pass = thread / kChunks;
    const T* const key = static_cast<const T*>(a.key) + slot * a.key_slot + group * a.key_head + chunk * 8;
    const T* const value = static_cast<const T*>(a.value) + slot * a.value_slot + group * a.value_head + chunk * 8;
    const int first = part.begin + tile * kTile;
    const uint32_t buffer = tile % 2 * kTileBytes;
#pragma unroll 4
    for (int row = pass; row < kTile; row += kPerPass) {
      const bool wanted = first + row < part.all;  // the rest is zeros: it may be anything, and zero times NaN is NaN
      const int64_t at = wanted ? first + row : 0;
      copy_16(keys + buffer + place<D>(row, chunk), key + at * a.key_row, wanted);
      copy_16(values + buffer + place<D>(row, chunk), value + at * a.value_row, wanted);
    }
  };
  const int tiles = (part.end - part.begin + kTile - 1) / kTile;  // none where slot or length are out of range
  fetch_query<T, D, kRows>(query, a, first_row);
  if (tiles > 0) fetch(0);
  end_of_copies();
  if (tiles > 1) fetch(1);
  end_of_copies();

  WarpRows<T, D, Frags> mine;
  const int warp_row = threadIdx.x / 32 * Frags * 16;
  const uint32_t warp_query = shared_address(query) + warp_row * D * 2;
  wait_for_copies<1>();
  __syncthreads();
  mine.hold(warp_query);
  for (int tile = 0; tile < tiles; tile++) {
    const int first = part.begin + tile * kTile;
    const bool masked = first + kTile > part.length;
    if (masked) find_hidden<kRows, Warps>(hidden, a, part, first_row, first);
    wait_for_copies<1>();
    __syncthreads();
    float scores[Frags][kTile / 8][4];
    mine.score(scores, warp_query, keys + tile % 2 * kTileBytes);
    if (masked) mine.hide(scores, hidden, a, first_row, warp_row);
    mine.weigh(scores, a.scale_log2);
    mine.mix(scores, values + tile % 2 * kTileBytes);
    __syncthreads();
    if (tile + 2 < tiles) fetch(tile + 2);
    end_of_copies();  // empty at the end, so that the count of pending groups stays right
  }

#pragma unroll
  for (int f = 0; f < Frags; f++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float sum = mine.sum[f][i];
      sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 1));
      sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 2));
      const int m = first_row + warp_row + mine.row(f, i);
      if (m >= part.rows(a)) continue;
      const int column = mine.lane % 4 * 2;
      if (a.splits == 1) {  // nothing to join
        const float share = __fdiv_rn(1.0f, sum);  // infinite without any keys, and zero times that is NaN
        uint32_t* const to = reinterpret_cast<uint32_t*>(static_cast<T*>(a.out) + part.out_offset(a, m) + column);
#pragma unroll
        for (int n = 0; n < D / 8; n++)
          to[n * 4] = pack(__fmul_rn(mine.mixture[f][n][2 * i], share), __fmul_rn(mine.mixture[f][n][2 * i + 1], share), T());
        continue;
      }
      if (column == 0) reinterpret_cast<float2*>(a.peak)[part.partial(a, m)] = make_float2(mine.top[f][i], sum);
      float* const to = a.mixture + part.partial(a, m) * D + column;
#pragma unroll
      for (int n = 0; n < D / 8; n++)
        *reinterpret_cast<float2*>(to + n * 8) = make_float2(mine.mixture[f][n][2 * i], mine.mixture[f][n][2 * i + 1]);
    }
}

template <class T, int D, int Warps, int Frags>
const char* launch(const SlotAttention& a, void* stream) {
  constexpr int kBytes = shared_bytes<T, D, Warps, Frags>(), kRows = Warps * Frags * 16;
  const int rows = a.R * (a.H / a.G);
  const dim3 grid((rows + kRows - 1) / kRows, a.splits, a.B * a.G);
  auto* const kernel = attend<T, D, Warps, Frags>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes) != cudaSuccess) return launch_error();
  kernel<<<grid, Warps * 32, kBytes, static_cast<cudaStream_t>(stream)>>>(a);
  return launch_error();
}

// How many splits fill the device `waves` times; 1 where nothing is known about it, and the launch will say why.
template <class T, int D, int Warps, int Frags>
int fill(const SlotAttention& a, int waves) {
  constexpr int kRows = Warps * Frags * 16, kReserved = 1024;  // bytes that every block takes beside its own
  constexpr int kWarps = 8;  // for more there are no registers
  int device = 0, processors = 0, shared = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) != cudaSuccess)
    return 1;
  const int at_once = processors * std::clamp(shared / (shared_bytes<T, D, Warps, Frags>() + kReserved), 1, kWarps / Warps);
  const int blocks = (a.R * (a.H / a.G) + kRows - 1) / kRows * a.B * a.G;
  return waves * at_once / blocks;
}

// As few rows of padding as possible; 32 rows per warp where there are many, because each key read then serves two.
template <class T, int D, class Visit>
auto with_rows(const SlotAttention& a, Visit visit) {
  const int rows = a.R * (a.H / a.G);
  if (rows <= 16) return visit.template operator()<T, D, 1, 1>();
  if (rows <= 32) return visit.template operator()<T, D, 2, 1>();
  if (rows <= 64) return visit.template operator()<T, D, 4, 1>();
  return visit.template operator()<T, D, 4, 2>();
}

template <class Visit>
auto with_kernel(const SlotAttention& a, Visit visit) {
  if (a.type == SlotType::kBfloat16)
    return a.D == 64 ? with_rows<__nv_bfloat16, 64>(a, visit) : with_rows<__nv_bfloat16, 128>(a, visit);
  return a.D == 64 ? with_rows<__half, 64>(a, visit) : with_rows<__half, 128>(a, visit);
}

}  // namespace

int slot_tile_splits(const SlotAttention& a) {
  return with_kernel(a, [&]<class T, int D, int Warps, int Frags>() {
    int64_t splits = fill<T, D, Warps, Frags>(a, 1);
    // Few rows wait for memory: blocks in reserve even out which of them wait, where they cost little.
    if (Warps <= 2) splits = std::max(splits, std::min<int64_t>(fill<T, D, Warps, Frags>(a, 4), a.capacity / kLongSplit));
    splits = std::min({splits, (a.capacity + kShortSplit - 1) / kShortSplit, static_cast<int64_t>(kMaxSplits)});
    return static_cast<int>(std::max<int64_t>(splits, 1));
  });
}

const char* launch_slot_tiles(const SlotAttention& a, void* stream) {
  return with_kernel(a, [&]<class T, int D, int Warps, int Frags>() { return launch<T, D, Warps, Frags>(a, stream); });
}

}  // namespace specblock

// Slot attention in bfloat16 and half on tensor cores; slot_attention.h says how the work is shared out.
//
// A warp owns 16 or 32 query rows: scores, weights and mixture stay in its registers, keys and values come through
// shared memory, two tiles deep. Rows do not meet before combine, so the number of warps changes nothing in a row.
#include "launch.h"
#include "slot_attention.cuh"
#include "tensor_core.cuh"

namespace specblock {
namespace {

constexpr int kTile = kSplitStep;  // keys in shared memory at once, per buffer
constexpr int kStep = 32;          // keys per update of the running maximum; their scores fit into the registers

template <class T>
__device__ inline uint4 read_8(const T* from, bool aligned) {
  if (aligned) return *reinterpret_cast<const uint4*>(from);
  const auto* half = reinterpret_cast<const uint16_t*>(from);
  uint32_t word[4];
  for (int i = 0; i < 4; i++) word[i] = half[2 * i] | static_cast<uint32_t>(half[2 * i + 1]) << 16;
  return make_uint4(word[0], word[1], word[2], word[3]);
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

  // scores[f][n] = the products of the warp's rows with keys first + 8 n .. first + 8 n + 7 of the tile.
  __device__ void score(float (&scores)[Frags][kStep / 8][4], uint32_t query, uint32_t key, int first) const {
    const uint32_t key_lane = key + place<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int f = 0; f < Frags; f++)
#pragma unroll
      for (int n = 0; n < kStep / 8; n++)
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
      for (int n = 0; n < kStep / 16; n++) {
        uint32_t k[4];
        load_matrices(k, (key_lane ^ (d * 32)) + (first + n * 16) * D * 2);
#pragma unroll
        for (int f = 0; f < Frags; f++) {
          multiply(scores[f][2 * n], q[f], k[0], k[1], T());
          multiply(scores[f][2 * n + 1], q[f], k[2], k[3], T());
        }
      }
    }
  }

  // Bit 16 i + 2 n + e of hidden[f]: whether what becomes scores[f][n][2 i + e] is none of that row's keys.
  __device__ void find_hidden(uint32_t (&hidden)[Frags], const SlotAttention& a, const SlotPart& part, int first_row,
                              int first) const {
#pragma unroll
    for (int f = 0; f < Frags; f++) {
      hidden[f] = 0;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int m = first_row + row(f, i);
        asm volatile("" : "+r"(m));  // or the pointers of all rows would be held in registers all along
        const bool* const visible = part.visible(a, m);
#pragma unroll 4
        for (int n = 0; n < kStep / 8; n++)
          for (int e = 0; e < 2; e++)
            if (part.hidden(a, visible, first + n * 8 + lane % 4 * 2 + e)) hidden[f] |= 1u << (16 * i + 2 * n + e);
      }
    }
  }

  __device__ void hide(float (&scores)[Frags][kStep / 8][4], const uint32_t (&hidden)[Frags]) const {
#pragma unroll
    for (int f = 0; f < Frags; f++)
#pragma unroll
      for (int n = 0; n < kStep / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (hidden[f] >> (e / 2 * 16 + 2 * n + e % 2) & 1) scores[f][n][e] = -INFINITY;
  }

  // Scores become weights, relative to a new running maximum; what was mixed so far is brought down to it.
  __device__ void weigh(float (&scores)[Frags][kStep / 8][4], float scale_log2) {
#pragma unroll
    for (int f = 0; f < Frags; f++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float most = top[f][i];
#pragma unroll
        for (int n = 0; n < kStep / 8; n++) most = fmaxf(most, fmaxf(scores[f][n][2 * i], scores[f][n][2 * i + 1]));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        // A row that has seen nothing yet has no maximum: weights 2^(-inf - 0), not 2^(-inf + inf).
        const float base = most == -INFINITY ? 0.0f : most;
        // A difference first: exactly 1 where the maximum stays, so steps without a visible key change no bit.
        const float shrink = power_of_two(__fmul_rn(__fsub_rn(top[f][i], base), scale_log2));
        const float offset = __fmul_rn(base, -scale_log2);
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < kStep / 8; n++)
#pragma unroll
          for (int e = 2 * i; e < 2 * i + 2; e++) {
            scores[f][n][e] = power_of_two(__fmaf_rn(scores[f][n][e], scale_log2, offset));
            total = __fadd_rn(total, scores[f][n][e]);
          }
        top[f][i] = most;
        sum[f][i] = __fmaf_rn(sum[f][i], shrink, total);  // of this lane's columns
        if (__any_sync(0xffffffffu, shrink != 1.0f)) {  // seldom, after the first few steps
#pragma unroll
          for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int e = 2 * i; e < 2 * i + 2; e++) mixture[f][n][e] = __fmul_rn(mixture[f][n][e], shrink);
        }
      }
  }

  // mixture += weights times the values first .. first + kStep - 1 of the tile.
  __device__ void mix(const float (&weights)[Frags][kStep / 8][4], uint32_t value, int first) {
    const uint32_t value_lane = value + place<D>(lane % 16, lane / 16);
#pragma unroll
    for (int n = 0; n < kStep / 16; n++) {
      uint32_t w[Frags][4];
#pragma unroll
      for (int f = 0; f < Frags; f++)
#pragma unroll
        for (int j = 0; j < 4; j++)
          w[f][j] = pack(weights[f][2 * n + j / 2][j % 2 * 2], weights[f][2 * n + j / 2][j % 2 * 2 + 1], T());
#pragma unroll
      for (int d = 0; d < D / 16; d++) {
        uint32_t v[4];
        load_transposed(v, (value_lane ^ (d * 32)) + (first + n * 16) * D * 2);
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
  return (Warps * Frags * 16 + 4 * kTile) * D * static_cast<int>(sizeof(T));
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

  const SlotPart part(a);
  const int first_row = blockIdx.x * kRows;
  if (part.begin >= part.end) {
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
  const int tiles = (part.end - part.begin + kTile - 1) / kTile;
  fetch(0);
  end_of_copies();
  if (tiles > 1) fetch(1);
  end_of_copies();
  for (int i = threadIdx.x; i < kRows * kChunks; i += Warps * 32) {
    const int row = i / kChunks, chunk = i % kChunks, m = first_row + row;
    uint4 eight = make_uint4(0, 0, 0, 0);
    if (m < part.rows(a))
      eight = read_8(static_cast<const T*>(a.query) + part.query_offset(a, m) + chunk * 8, a.query_is_aligned);
    *reinterpret_cast<uint4*>(query + place<D>(row, chunk)) = eight;
  }

  WarpRows<T, D, Frags> mine;
  const int warp_row = threadIdx.x / 32 * Frags * 16;
  const uint32_t warp_query = shared_address(query) + warp_row * D * 2;
  __syncthreads();
  mine.hold(warp_query);
  for (int tile = 0; tile < tiles; tile++) {
    wait_for_copies<1>();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kTile; step += kStep) {
      const int first = part.begin + tile * kTile + step;
      const bool masked = first + kStep > part.length;
      uint32_t hidden[Frags];  // found before the scores, so that the search needs no register that they need
      if (masked) mine.find_hidden(hidden, a, part, first_row + warp_row, first);
      float scores[Frags][kStep / 8][4];
      mine.score(scores, warp_query, keys + tile % 2 * kTileBytes, step);
      if (masked) mine.hide(scores, hidden);
      mine.weigh(scores, a.scale_log2);
      mine.mix(scores, values + tile % 2 * kTileBytes, step);
    }
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
      if (mine.lane % 4 == 0) reinterpret_cast<float2*>(a.peak)[part.partial(a, m)] = make_float2(mine.top[f][i], sum);
      float* const to = a.mixture + part.partial(a, m) * D + mine.lane % 4 * 2;
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

// As few rows of padding as possible; 32 rows per warp where there are many, because each key read then serves two.
template <class T, int D>
const char* launch_rows(const SlotAttention& a, void* stream) {
  const int rows = a.R * (a.H / a.G);
  if (rows <= 16) return launch<T, D, 1, 1>(a, stream);
  if (rows <= 32) return launch<T, D, 2, 1>(a, stream);
  if (rows <= 64) return launch<T, D, 4, 1>(a, stream);
  return launch<T, D, 4, 2>(a, stream);
}

}  // namespace

const char* launch_slot_tiles(const SlotAttention& a, void* stream) {
  if (a.type == SlotType::kBfloat16)
    return a.D == 64 ? launch_rows<__nv_bfloat16, 64>(a, stream) : launch_rows<__nv_bfloat16, 128>(a, stream);
  return a.D == 64 ? launch_rows<__half, 64>(a, stream) : launch_rows<__half, 128>(a, stream);
}

}  // namespace specblock

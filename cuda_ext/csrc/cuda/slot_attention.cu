// Slot attention in bfloat16 and half on tensor cores; slot_attention.h says how the work is shared out.
//
// Warps share the keys and values of a tile, two tiles deep in shared memory; slot_warp.cuh is what each does with one.
// What hides keys is looked up only in the tiles that hold new rows.
#include <algorithm>
#include <cmath>

#include "launch.h"
#include "slot_attention.cuh"
#include "slot_warp.cuh"

namespace specblock {
namespace {

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
  if (tiles > 0) fetch(0);
  fetch_query<T, D, kRows>(query, a, first_row);
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
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes) != cudaSuccess ||
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared) != cudaSuccess)
    return launch_error();
  kernel<<<grid, Warps * 32, kBytes, static_cast<cudaStream_t>(stream)>>>(a);
  return launch_error();
}

// The number of splits that promises the least time; 1 where nothing is known about the device: the launch will say why.
template <class T, int D, int Warps, int Frags>
int best_splits(const SlotAttention& a) {
  constexpr int kRows = Warps * Frags * 16, kReserved = 1024;  // bytes that every block takes beside its own
  constexpr int kWarps = 8;  // at once per processor; for more there are no registers
  int device = 0, processors = 0, shared = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) != cudaSuccess)
    return 1;
  const int at_once = processors * std::clamp(shared / (shared_bytes<T, D, Warps, Frags>() + kReserved), 1, kWarps / Warps);
  const int blocks = (a.R * (a.H / a.G) + kRows - 1) / kRows * a.B * a.G, tokens = static_cast<int>(a.capacity);
  const int most = std::min(kMaxSplits, (tokens + kShortSplit - 1) / kShortSplit);
  // In times that a tile of keys takes: a block needs about two to begin, the kernel that joins splits two to be
  // launched, and for each wave of blocks one per 32 rows, whose mixtures are written and read.
  int best = 1;
  double least = 0;
  for (int splits = 1; splits <= most; splits++) {
    const double waves = static_cast<double>(blocks) * splits / at_once;
    const int tiles = (tokens + splits * kTile - 1) / (splits * kTile);
    const double time = std::ceil(waves) * (tiles + 2) + (splits > 1 ? 2 + waves * kRows / 32 : 0);
    if (splits == 1 || time < least) best = splits, least = time;
  }
  // Few rows wait for memory: waves in reserve even out which blocks wait longest, and mixtures are small.
  const int reserve = Warps <= 2 ? std::min({4 * at_once / blocks, tokens / kLongSplit, kMaxSplits}) : 1;
  return std::max(best, reserve);
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
  return with_kernel(a, [&]<class T, int D, int Warps, int Frags>() { return best_splits<T, D, Warps, Frags>(a); });
}

const char* launch_slot_tiles(const SlotAttention& a, void* stream) {
  return with_kernel(a, [&]<class T, int D, int Warps, int Frags>() { return launch<T, D, Warps, Frags>(a, stream); });
}

}  // namespace specblock

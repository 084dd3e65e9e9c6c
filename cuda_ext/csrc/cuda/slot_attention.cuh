// What the tensor-core and the float32 kernel of slot attention have in common.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "slot_attention.h"

namespace specblock {

// The part of one request's keys that a block goes through; blockIdx is (tile of query rows, split, request and head).
// What is needed only before and after the keys are read is computed when asked for: registers are short in between.
struct SlotPart {
  int length, all;  // committed tokens; with the new rows
  int begin, end;   // of this split; nothing to do where begin >= end

  __device__ explicit SlotPart(const SlotAttention& a) {
    const int64_t place = slot(a), committed = a.lengths[request(a)];
    // The host cannot look at these; what is out of range is given no keys, and its result is NaN.
    const bool fits = place >= 0 && place < a.num_slots && committed >= 0 && committed + a.R <= a.capacity;
    length = fits ? static_cast<int>(committed) : 0;
    all = fits ? length + a.R : 0;
    const int tokens = a.split_tokens > 0 ? a.split_tokens : even_split(a);
    begin = blockIdx.y * tokens;
    end = min(begin + tokens, all);
  }

  __device__ int even_split(const SlotAttention& a) const {
    const int steps = (all + a.splits * kSplitStep - 1) / (a.splits * kSplitStep);
    return max(steps * kSplitStep, kShortSplit);
  }

  __device__ static int request(const SlotAttention& a) { return blockIdx.z / a.G; }
  __device__ static int group(const SlotAttention& a) { return blockIdx.z % a.G; }
  __device__ static int64_t slot(const SlotAttention& a) { return a.slots[request(a)]; }
  __device__ static int rows(const SlotAttention& a) { return a.R * (a.H / a.G); }  // M

  // Index of query row m of this split in the workspace.
  __device__ static int64_t partial(const SlotAttention& a, int m) {
    return (static_cast<int64_t>(blockIdx.z) * a.splits + blockIdx.y) * rows(a) + m;
  }

  // Query row m is head m % heads of new row m / heads.
  __device__ static int64_t query_offset(const SlotAttention& a, int m) {
    const int heads = a.H / a.G;
    return request(a) * a.query_batch + (group(a) * heads + m % heads) * a.query_head + m / heads * a.query_row;
  }

  __device__ static int64_t out_offset(const SlotAttention& a, int m) {
    const int heads = a.H / a.G;
    return ((static_cast<int64_t>(request(a)) * a.R + m / heads) * a.H + group(a) * heads + m % heads) * a.D;
  }

  // What query row m sees of the new rows; rows of padding behind the last see what the first sees.
  __device__ static const bool* visible(const SlotAttention& a, int m) {
    const int row = m < rows(a) ? m / (a.H / a.G) : 0;
    return a.visible + (static_cast<int64_t>(request(a)) * a.R + row) * a.R;
  }

  __device__ bool hidden(const SlotAttention& a, const bool* visible, int position) const {
    const int row = position - length;
    return row >= 0 && (row >= a.R || !visible[row]);
  }

  // Marks the split as empty for the block's query rows.
  __device__ static void leave_empty(const SlotAttention& a, int first, int count) {
    for (int i = threadIdx.x; i < count && first + i < rows(a); i += blockDim.x)
      reinterpret_cast<float2*>(a.peak)[partial(a, first + i)] = make_float2(-INFINITY, 0.0f);
  }
};

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes to shared memory in the background, or writes zeros without reading.
__device__ inline void copy_16(uint32_t shared, const void* global, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(wanted ? 16 : 0)
               : "memory");
}

__device__ inline void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the latest `Pending` groups of this thread's copies have arrived.
template <int Pending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// 2^x; exactly 1 for 0 and exactly 0 for -inf.
__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace specblock

// What the tensor-core and the float32 kernel of slot attention have in common.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "slot_attention.h"

namespace specblock {

// The part of one request's keys that a block goes through; blockIdx is (tile of query rows, split, request and head).
struct SlotPart {
  int request, group, heads, rows;  // heads: query heads per key/value head; rows: M
  int64_t slot;
  int length, all;                  // committed tokens; with the new rows
  int begin, end;                   // of this split; nothing to do where begin >= end
  int64_t partial;                  // index of the split's first row in the workspace

  __device__ explicit SlotPart(const SlotAttention& a) {
    request = blockIdx.z / a.G;
    group = blockIdx.z % a.G;
    heads = a.H / a.G;
    rows = a.R * heads;
    slot = a.slots[request];
    const int64_t committed = a.lengths[request];
    // The host cannot look at these; what is out of range is given no keys, and its result is NaN.
    const bool fits = slot >= 0 && slot < a.num_slots && committed >= 0 && committed + a.R <= a.capacity;
    length = fits ? static_cast<int>(committed) : 0;
    all = fits ? length + a.R : 0;
    begin = blockIdx.y * a.split_tokens;
    end = min(begin + a.split_tokens, all);
    partial = (static_cast<int64_t>(blockIdx.z) * a.splits + blockIdx.y) * rows;
  }

  // Query row m is head m % heads of new row m / heads.
  __device__ int64_t query_offset(const SlotAttention& a, int m) const {
    return request * a.query_batch + (group * heads + m % heads) * a.query_head + m / heads * a.query_row;
  }

  // What query row m sees of the new rows; rows of padding behind the last see what the first sees.
  __device__ const bool* visible(const SlotAttention& a, int m) const {
    const int row = m < rows ? m / heads : 0;
    return a.visible + (static_cast<int64_t>(request) * a.R + row) * a.R;
  }

  __device__ bool hidden(const SlotAttention& a, const bool* visible, int position) const {
    const int row = position - length;
    return row >= 0 && (row >= a.R || !visible[row]);
  }

  // Marks the split as empty for the block's query rows.
  __device__ void leave_empty(const SlotAttention& a, int first, int count) const {
    for (int i = threadIdx.x; i < count && first + i < rows; i += blockDim.x)
      reinterpret_cast<float2*>(a.peak)[partial + first + i] = make_float2(-INFINITY, 0.0f);
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

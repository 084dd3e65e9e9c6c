// The uniform numbers of cuda_ext/noise.py: every thread makes the four of one counter.
#include "../philox.h"
#include "cycle.h"
#include "launch.h"

namespace specblock {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    philox_kernel(const int64_t* __restrict__ seed, const int64_t* __restrict__ choice, const int64_t* __restrict__ position,
                  double* __restrict__ out, int64_t blocks, int64_t total, int64_t vocab_size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= total) return;
  const int64_t row = i / blocks, token = i % blocks * 4;
  const PhiloxWords bits = token_words(static_cast<uint64_t>(seed[row]), static_cast<uint64_t>(choice[row]),
                                       static_cast<uint64_t>(position[row]), token / 4);
  double* to = out + row * vocab_size + token;
#pragma unroll
  for (int lane = 0; lane < 4; lane++)
    if (token + lane < vocab_size) to[lane] = uniform(bits.word[lane]);
}

}  // namespace
}  // namespace specblock

extern "C" const char* specblock_cuda_philox(const int64_t* seed, const int64_t* choice, const int64_t* position, double* out,
                                             int64_t rows, int64_t vocab_size, void* stream) {
  using namespace specblock;
  const int64_t blocks = (vocab_size + 3) / 4, total = rows * blocks;
  if (total == 0) return nullptr;
  philox_kernel<<<static_cast<unsigned>((total + kThreads - 1) / kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      seed, choice, position, out, blocks, total, vocab_size);
  return launch_error();
}

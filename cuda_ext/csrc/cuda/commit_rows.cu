// Moves the key or value rows of accepted nodes behind the committed prefix, in place.
//
// A block owns some columns of one request's rows in one layer and head: it reads all of them before it writes any, so
// moves may overlap. Rows that would leave the storage stay where they are.
#include "cycle.h"
#include "launch.h"

namespace specblock {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kSharedBytes = 40 << 10;

extern __shared__ __align__(16) char staged_bytes[];

template <class Word>
__global__ void __launch_bounds__(kThreads) commit_kernel(const CommitInputs inputs, int row_words, int columns) {
  auto* staged = reinterpret_cast<Word*>(staged_bytes);  // [moved][columns]
  const int64_t request = blockIdx.z, layer = blockIdx.x / inputs.heads, head = blockIdx.x % inputs.heads;
  const int64_t slot = inputs.slot[request], start = inputs.start[request];
  if (slot < 0 || slot >= inputs.slots || start < 0) return;
  const int64_t* from = inputs.row + request * inputs.row_stride;
  const int first = blockIdx.y * columns, here = min(columns, row_words - first);
  const int64_t plane = (layer * inputs.slots + slot) * inputs.heads + head;
  Word* rows = static_cast<Word*>(inputs.storage) + plane * inputs.capacity * row_words + first;
  const int cells = static_cast<int>(inputs.moved) * here;
  const auto moves = [&](int64_t j) {
    const int64_t row = from[j];
    return row != j && row >= 0 && row < inputs.capacity && start + max(row, j) < inputs.capacity;
  };
  for (int cell = threadIdx.x; cell < cells; cell += kThreads) {
    const int64_t j = cell / here, column = cell % here;
    if (moves(j)) staged[cell] = rows[(start + from[j]) * row_words + column];
  }
  __syncthreads();
  for (int cell = threadIdx.x; cell < cells; cell += kThreads) {
    const int64_t j = cell / here, column = cell % here;
    if (moves(j)) rows[(start + j) * row_words + column] = staged[cell];
  }
}

template <class Word>
const char* commit(const CommitInputs& inputs, void* stream) {
  const int64_t row_words = inputs.row_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t most = kSharedBytes / (inputs.moved * static_cast<int64_t>(sizeof(Word)));
  if (most == 0) return "too many rows move at once";
  const int64_t columns = most < row_words ? most : row_words, parts = (row_words + columns - 1) / columns;
  const dim3 grid(static_cast<unsigned>(inputs.layers * inputs.heads), static_cast<unsigned>(parts),
                  static_cast<unsigned>(inputs.requests));
  commit_kernel<Word><<<grid, kThreads, inputs.moved * columns * sizeof(Word), static_cast<cudaStream_t>(stream)>>>(
      inputs, static_cast<int>(row_words), static_cast<int>(columns));
  return launch_error();
}

}  // namespace
}  // namespace specblock

extern "C" const char* specblock_cuda_commit_rows(const specblock::CommitInputs* inputs, void* stream) {
  using namespace specblock;
  if (inputs->requests * inputs->moved * inputs->layers * inputs->heads * inputs->row_bytes == 0) return nullptr;
  const auto fits = [&](int64_t word) {
    return inputs->row_bytes % word == 0 && reinterpret_cast<uintptr_t>(inputs->storage) % word == 0;
  };
  if (fits(16)) return commit<uint4>(*inputs, stream);
  if (fits(4)) return commit<uint32_t>(*inputs, stream);
  if (fits(2)) return commit<uint16_t>(*inputs, stream);
  return commit<uint8_t>(*inputs, stream);
}

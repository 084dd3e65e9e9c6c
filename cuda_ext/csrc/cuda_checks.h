// What every operation on a CUDA device checks and asks PyTorch for before it launches a kernel.
//
// Kernels are in cuda/*.cu and know nothing of PyTorch: raw pointers, sizes and strides go in, the message of a failed
// launch (or null) comes out.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "checks.h"

// Declared here because the CPU build of PyTorch does not: weak, so that one library loads on both.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace specblock {

// Makes the device of a tensor the current one for the life of this object and knows PyTorch's stream on it.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& on) : index_(on.get_device_index()), guard_(index_) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this PyTorch was built without CUDA");
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_) == AOTI_TORCH_SUCCESS, "PyTorch has no stream");
  }

  void* stream() const { return stream_; }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// A strided tensor of a CUDA device; `like` is one whose device it must share.
inline void check_cuda(const Tensor& tensor, const Tensor& like, ScalarType type, int64_t dims, const char* what) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), what,
                  ": must be on the CUDA device of the other tensors");
  STD_TORCH_CHECK(tensor.scalar_type() == type, what, ": has another type than expected");
  STD_TORCH_CHECK(tensor.dim() == dims, what, ": has another number of dimensions than expected");
}

inline void check_cuda_contiguous(const Tensor& tensor, const Tensor& like, ScalarType type, int64_t dims, const char* what) {
  check_cuda(tensor, like, type, dims, what);
  STD_TORCH_CHECK(tensor.is_contiguous(), what, ": must be contiguous");
}

// Whether vector accesses of 16 bytes along the last dimension are aligned in every row.
inline bool aligned_rows(const Tensor& tensor) {
  const int64_t per_vector = 16 / static_cast<int64_t>(tensor.element_size());
  bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d + 1 < tensor.dim(); d++)
    aligned = aligned && (tensor.stride(d) % per_vector == 0 || tensor.size(d) <= 1);
  return aligned;
}

// `error`: what a launcher returned.
inline void check_launch(const char* error, const char* what) {
  STD_TORCH_CHECK(error == nullptr, what, ": the kernel could not be started: ", error == nullptr ? "" : error);
}

}  // namespace specblock

// What every kernel file needs around a launch.
#pragma once

#include <cuda_runtime.h>

namespace specblock {

// The message of what went wrong since the last call, or null. Clears it: an error must not surface in a later launch.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace specblock

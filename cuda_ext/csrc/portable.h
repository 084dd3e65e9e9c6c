// Code that the CPU operations and the CUDA kernels share: for both under nvcc, plain C++ elsewhere.
#pragma once

#if defined(__CUDACC__)
#define SB_BOTH __host__ __device__
#else
#define SB_BOTH
#endif

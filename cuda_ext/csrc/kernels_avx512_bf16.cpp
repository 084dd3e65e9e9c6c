// Kernels for processors with AVX-512 that multiply bfloat16 numbers in vectors (AVX-512 BF16), but have no matrix unit.
#if defined(__x86_64__) && __GNUC__ >= 11
// Standard headers come before the instruction set is chosen: what they define is shared with other files.
#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <vector>

#include "kernels.h"
#include "philox.h"

bool specblock::has_bfloat16_products() {
  constexpr unsigned kBfloat16 = 1u << 5;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & kBfloat16) == 0) return false;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#define SB_LANES 16
#include "choose.h"
#include "draft_top.h"
#include "gate.h"
#include "pair_matmul.h"
#include "panel_matmul.h"
#include "philox_row.h"
#include "rms_norm.h"
#include "tree_attention.h"

const specblock::Kernels specblock::kAvx512Bf16 = {multiply_either, multiply<float>, attend, normalise, draft_top, gate,
    choose, uniform_row};
#elif defined(__x86_64__)
#include "kernels.h"

bool specblock::has_bfloat16_products() { return false; }  // this compiler does not know them
const specblock::Kernels specblock::kAvx512Bf16 = specblock::kAvx512;
#endif

// Kernels for processors with AVX-512 and a matrix unit for bfloat16 (AMX).
#if defined(__x86_64__) && __GNUC__ >= 11
// Standard headers come before the instruction set is chosen: what they define is shared with other files.
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

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

// Linux gives a process the unit's registers, which are large, only if it asks for them.
bool specblock::has_matrix_unit() {
  constexpr long kAskForState = 0x1023, kTileData = 18;
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBfloat16) == 0 || (d & kTiles) == 0) return false;
  const bool vectors = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return vectors && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,amx-tile,amx-bf16")
#define SB_LANES 16
#include "choose.h"
#include "draft_top.h"
#include "gate.h"
#include "panel_matmul.h"
#include "philox_row.h"
#include "rms_norm.h"
#include "tile_matmul.h"
#include "tree_attention.h"

const specblock::Kernels specblock::kAmx = {multiply_tiles, multiply<float>, attend, normalise, draft_top, gate,
    choose, uniform_row};
#elif defined(__x86_64__)
#include "kernels.h"

bool specblock::has_matrix_unit() { return false; }  // this compiler does not know it
const specblock::Kernels specblock::kAmx = specblock::kAvx512;
#endif

// Kernels for processors with AVX-512.
#if defined(__x86_64__)
// Standard headers come before the instruction set is chosen: what they define is shared with other files.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "kernels.h"
#include "philox.h"

#pragma GCC target("avx512f,avx2,fma")
#define SB_LANES 16
#include "choose.h"
#include "draft_top.h"
#include "gate.h"
#include "panel_matmul.h"
#include "philox_row.h"
#include "rms_norm.h"
#include "tree_attention.h"

const specblock::Kernels specblock::kAvx512 = {multiply_half, multiply<float>, attend, normalise, draft_top, gate,
    choose, uniform_row};
#endif

// Kernels for processors with AVX2 and FMA.
#if defined(__x86_64__)
// Standard headers come before the instruction set is chosen: what they define is shared with other files.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "kernels.h"
#include "philox.h"

#pragma GCC target("avx2,fma")
#define SB_LANES 8
#include "choose.h"
#include "draft_top.h"
#include "gate.h"
#include "panel_matmul.h"
#include "philox_row.h"
#include "rms_norm.h"
#include "tree_attention.h"

const specblock::Kernels specblock::kAvx2 = {multiply_half, multiply<float>, attend, normalise, draft_top, gate,
    choose, uniform_row};
#endif

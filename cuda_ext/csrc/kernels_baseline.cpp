// Kernels for any processor.
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

#define SB_LANES 4
#include "choose.h"
#include "draft_top.h"
#include "gate.h"
#include "panel_matmul.h"
#include "philox_row.h"
#include "rms_norm.h"
#include "tree_attention.h"

const specblock::Kernels specblock::kBaseline = {multiply_half, multiply<float>, attend, normalise, draft_top, gate,
    choose, uniform_row};

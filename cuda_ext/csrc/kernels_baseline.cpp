// Kernels for any processor.
// Standard headers come before the instruction set is chosen: what they define is shared with other files.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"

#define SB_LANES 4
#include "draft_top.h"
#include "gate.h"
#include "panel_matmul.h"
#include "rms_norm.h"
#include "tree_attention.h"

const specblock::Kernels specblock::kBaseline = {multiply_half, multiply<float>, attend, normalise, draft_top, gate};

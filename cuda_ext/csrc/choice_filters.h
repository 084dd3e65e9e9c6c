// How one row's token is chosen.
#pragma once

#include <cstdint>

namespace specblock {

struct ChoiceFilters {
  double temperature, top_p, min_p;
  int64_t top_k;
};

}  // namespace specblock

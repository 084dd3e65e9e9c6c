// Scores along the greedy chain of one leaf, slot by slot; see drafter/expand.py.
#pragma once

#include "portable.h"

namespace specblock {

class GreedyChain {
 public:
  SB_BOTH explicit GreedyChain(float leaf_score) : leaf_score_(leaf_score), parent_(leaf_score) {}

  // Goes to the next slot, whose best log-probability this is.
  SB_BOTH void enter(float greedy) {
    greedy_ = greedy;
    summed_ += greedy;
    above_ = leaf_score_ + (static_cast<float>(summed_) - greedy);
  }

  // Of a token of this slot: never above its parent, however the sum is rounded, or a tree could keep it alone.
  SB_BOTH float score(float log_prob) const {
    const float summed = above_ + log_prob;
    return summed > parent_ ? parent_ : summed;
  }

  // Whether a node of this score can stand here: filtered tokens cannot, nor can anything behind one in the chain.
  SB_BOTH bool may_follow(float score) const { return alive_ && score - score == 0; }

  SB_BOTH void leave() {
    parent_ = score(greedy_);
    alive_ = may_follow(parent_);
  }

 private:
  float leaf_score_, parent_, greedy_ = 0, above_ = 0;
  double summed_ = 0;  // as torch.cumsum adds up float32
  bool alive_ = true;
};

}  // namespace specblock

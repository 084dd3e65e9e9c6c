"""Random draft trees that need no hypothesis: measurements and tests on a GPU use them too.

Legend: B requests, M raw candidates, D tree depth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specblock.cuda_ext.tree import Candidates


def random_candidates(
    generator: torch.Generator,
    batch: int,
    num_raw: int,
    vocab_size: int,
    max_depth: int,
    truth_BD: Tensor | None = None,
    hit_rate: float = 0.6,
) -> Candidates:
    """Random topologies with random tokens, vectorised over requests.

    Args:
        truth_BD: int64 [B, >= D], the true continuation of each request; a node gets the true token of its depth with
            probability ``hit_rate`` (so deep acceptance happens), else any token. None: any tokens.
    """

    def uniform() -> Tensor:
        return torch.rand(batch, generator=generator)

    rows = torch.arange(batch)
    token = torch.zeros(batch, num_raw, dtype=torch.int64)
    parent, depth, score = token.clone(), token.clone(), torch.zeros(batch, num_raw)
    for index in range(num_raw):
        above = torch.where(uniform() < 0.5, index - 1, (uniform() * (index + 1)).long() - 1)
        level = torch.where(above < 0, 0, depth[rows, above.clamp(min=0)])
        above = torch.where(level >= max_depth, -1, above)
        level = torch.where(above < 0, 0, level)
        parent[:, index], depth[:, index] = above, level + 1
        parent_score = torch.where(above < 0, 0.0, score[rows, above.clamp(min=0)])
        score[:, index] = parent_score - (uniform() * 4).floor() / 2
        token[:, index] = (uniform() * vocab_size).long()
        if truth_BD is not None:
            token[:, index] = torch.where(uniform() < hit_rate, truth_BD[rows, level], token[:, index])
    none = torch.zeros_like(token)
    every = torch.ones_like(token, dtype=torch.bool)
    return Candidates(token, parent, score, depth, none, (depth - 1).clamp(max=3), none, every)

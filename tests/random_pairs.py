"""Random tables of pairs and proposals whose scores are exact, so that no rounding decides an order."""

from __future__ import annotations

import torch
from torch import Tensor

from specblock.cuda_ext.pair_gains import PairGains


def random_pairs(vocab_size: int, count: int, generator: torch.Generator) -> PairGains:
    """Some ``count`` of all pairs, with gains in eighths; a few places stay empty."""
    keys = torch.randperm(vocab_size**2, generator=generator)[:count].sort().values
    each = torch.bincount(keys // vocab_size, minlength=vocab_size)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(each, dim=0)])
    room = torch.nn.functional.pad
    return PairGains(
        starts=starts.to(torch.int32),
        tokens=room((keys % vocab_size).to(torch.int32), (0, 3)),
        gains=room(torch.randint(-24, 40, (count,), generator=generator) / 8, (0, 3), value=9.0),
        rest=-torch.randint(0, 16, (vocab_size,), generator=generator) / 8,
        keys=room(keys, (0, 3), value=vocab_size**2),
    )


def random_proposals(
    batch: int, leaves: int, slots: int, width: int, vocab_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """token, log_prob in eighths (some filtered), best first, and temperatures."""
    shape = (batch, leaves, slots)
    token = torch.rand(*shape, vocab_size, generator=generator).argsort(dim=-1)[..., :width].contiguous()
    log_prob = -torch.randint(8, 64, (*shape, width), generator=generator) / 8
    log_prob = log_prob.masked_fill(torch.rand(log_prob.shape, generator=generator) < 0.1, -torch.inf)
    temperature = torch.tensor([0.0, 0.0078125, 0.5, 1.0, 2.0])[torch.randint(0, 5, (batch,), generator=generator)]
    return token, log_prob.sort(dim=-1, descending=True).values, temperature.double()

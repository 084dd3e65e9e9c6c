"""Prompt lookup: the continuation of earlier occurrences of the last few tokens. No weights.

Legend: B requests, C capacity, m matches, D draft tokens per match.
Source: prompt lookup decoding (Saxena 2023), as transformers ships it; several matches make a tree instead of a chain.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from specblock.cuda_ext.noise import NoiseWindow
from specblock.cuda_ext.ops import grow_tree
from specblock.cuda_ext.sampling import SamplingBatch
from specblock.cuda_ext.transfer import on_device
from specblock.cuda_ext.tree import Candidates
from specblock.drafter.config import DraftSettings
from specblock.drafter.interface import Draft, NewPositions
from specblock.drafter.plan import DraftPlan, FixedLimits, Limits

_LONGEST_NGRAM = 3
_MATCHES = 4
_DRAFT_TOKENS = 10
# A later token, an older match and a shorter n-gram are each less likely to be right; only the order matters.
_DEPTH_COST, _MATCH_COST = 0.25, 0.7


class LookupCache:
    """The tokens of every slot: column i holds x_{i+1}."""

    def __init__(self, num_slots: int, capacity_positions: int, device: torch.device) -> None:
        self.tokens = torch.zeros(num_slots, capacity_positions, dtype=torch.int64, device=device)
        self.positions = [0] * num_slots

    def reset(self, slot: int, domain: str = "") -> None:
        """Forgets a slot."""
        self.positions[slot] = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the storage."""
        return self.tokens.numel() * self.tokens.element_size()


class LookupDrafter:
    """Drafts what followed the last tokens before."""

    def __init__(self, settings: DraftSettings, device: torch.device, dtype: torch.dtype) -> None:
        self.settings = settings
        self.model: nn.Module = nn.Module()
        self._device, self._dtype = device, dtype
        self._fixed = FixedLimits(settings)

    @property
    def max_depth(self) -> int:
        """Deepest node a tree can have."""
        return _DRAFT_TOKENS

    @property
    def shares_noise(self) -> bool:
        """There is no distribution to perturb."""
        return False

    @property
    def vocab_size(self) -> int:
        """Not needed without noise."""
        return 0

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the features, which are ignored."""
        return self._dtype

    def parameter_groups(self) -> Mapping[str, tuple[str, ...]]:
        """Nothing to train."""
        return {}

    def new_cache(self, num_slots: int, capacity_positions: int) -> LookupCache:
        """Room for the tokens of every slot."""
        return LookupCache(num_slots, capacity_positions + 1, self._device)

    def use_graphs(self, cache: LookupCache) -> None:
        """There is nothing worth recording."""

    def refresh(self, cache: LookupCache, slots: list[int], new: NewPositions) -> None:
        """Appends tokens."""
        for row, (slot, count) in enumerate(zip(slots, new.counts, strict=True)):
            at = cache.positions[slot]
            cache.tokens[slot, at : at + count] = new.tokens[row, :count]
            cache.positions[slot] = at + count

    def draft(
        self,
        cache: LookupCache,
        slots: list[int],
        new: NewPositions,
        root_token: Tensor,
        sampling: SamplingBatch,
        noise: NoiseWindow | None,
        limits: Limits | None = None,
    ) -> Draft:
        """One cycle; see ``BlockDrafter.draft``."""
        self.refresh(cache, slots, new)
        slots_B, length = on_device([slots, [cache.positions[s] for s in slots]], self._device)
        longest = max(1, *(cache.positions[s] for s in slots))
        candidates = continuations(cache.tokens[slots_B, :longest], length)
        budget = (limits or self._fixed).nodes(candidates.score.masked_fill(~candidates.valid, -torch.inf))
        tree, offers = grow_tree(root_token, candidates, budget, _DRAFT_TOKENS)
        return Draft(tree, DraftPlan((), budget), _DRAFT_TOKENS, offers)


def continuations(tokens_BC: Tensor, length_B: Tensor) -> Candidates:
    """What followed the best earlier occurrences of the last tokens: longest n-gram first, then the most recent.

    Args:
        tokens_BC: int64, histories; columns from ``length_B`` on are ignored.
        length_B: int64, tokens of each history.

    Returns:
        Up to 4 chains of 10 tokens per history.
    """
    batch, capacity = tokens_BC.shape
    column = torch.arange(capacity, device=tokens_BC.device)
    matched = torch.zeros_like(tokens_BC)
    running = column < (length_B - 1)[:, None]  # occurrences that end before the last token
    for back in range(_LONGEST_NGRAM):
        wanted = tokens_BC.gather(1, (length_B - 1 - back).clamp(min=0)[:, None])
        earlier = tokens_BC.roll(back, dims=1)
        running = running & (earlier == wanted) & (column >= back) & (length_B > back)[:, None]
        matched = matched + running
    count = min(_MATCHES, capacity)
    quality = torch.where(matched > 0, matched * capacity + column, -1)
    best = torch.topk(quality, count, dim=1)
    order_D = torch.arange(1, _DRAFT_TOKENS + 1, device=column.device)
    at_BmD = best.indices[..., None] + order_D
    valid = (best.values >= 0)[..., None] & (at_BmD < length_B[:, None, None])
    rank_m1 = torch.arange(count, device=column.device)[:, None]
    node = rank_m1 * _DRAFT_TOKENS + order_D - 2  # the node before, -1 (root) at the start of a chain
    parent = torch.where(order_D == 1, -1, node)

    def flat(values: Tensor) -> Tensor:
        return values.expand(batch, count, _DRAFT_TOKENS).reshape(batch, -1)

    zero = torch.zeros_like(at_BmD)
    token_BmD = tokens_BC.gather(1, at_BmD.flatten(1).clamp(max=capacity - 1)).view_as(at_BmD)
    return Candidates(
        token=token_BmD.flatten(1),
        parent=flat(parent),
        score=flat(-_DEPTH_COST * order_D - _MATCH_COST * rank_m1),
        depth=flat(order_D),
        block=flat(zero),
        slot=flat(order_D - 1),
        rank=flat(_rivals_before(token_BmD, valid)),
        valid=flat(valid),
    )


def _rivals_before(token_BmD: Tensor, valid_BmD: Tensor) -> Tensor:
    """int64 [B, m, D]: how many better matches, which agree on everything before, also propose a token there."""
    count = token_BmD.shape[1]
    agree = torch.cumprod((token_BmD[:, :, None] == token_BmD[:, None]).to(torch.int64), dim=-1)  # [B, m, m, D]
    until = torch.cat([torch.ones_like(agree[..., :1]), agree[..., :-1]], dim=-1)
    better = torch.ones(count, count, dtype=torch.int64, device=token_BmD.device).tril(-1)[..., None]
    return (until * better * valid_BmD[:, None]).sum(dim=2)

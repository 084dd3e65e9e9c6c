"""Block-iterative drafting: features of the last verification in, draft tree out.

One loop serves every network. SpecBlock runs two blocks of four slots, EAGLE-3 eight blocks of one, parallel heads a
single block; refresh and block 1 are one forward, every later block is one forward over all leaves.

Legend: B requests, P new positions, K slots, n leaves, S cache rows.
Source: method reference 2.2, 4 (tree), 5.4 (refresh pairing), 8 (EAGLE-3), 9.1-9.3; design 4 and 4.1 (shared noise).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specblock.cuda_ext.noise import NoiseRows, NoiseWindow
from specblock.cuda_ext.ops import grow_tree
from specblock.cuda_ext.sampling import SamplingBatch
from specblock.cuda_ext.transfer import on_device
from specblock.cuda_ext.tree import Candidates
from specblock.drafter.config import DraftSettings
from specblock.drafter.expand import (
    Leaves,
    choose_leaves,
    concatenate,
    expand_chain,
    expand_product,
    extendable,
    root_leaf,
)
from specblock.drafter.fan_out import FanOutRule
from specblock.drafter.interface import Draft, NewPositions
from specblock.drafter.kv_cache import DrafterCache
from specblock.drafter.masks import MaskBlocks
from specblock.drafter.network import DraftNetwork
from specblock.drafter.plan import DraftPlan, FixedLimits, Limits
from specblock.drafter.proposals import Proposals, Ranking, propose
from specblock.drafter.published import published_positions
from specblock.drafter.slots import POSITIONS, SlotBlocks


class BlockDrafter:
    """Grows one tree per request and cycle from a :class:`DraftNetwork` and its cache."""

    def __init__(
        self, model: DraftNetwork, settings: DraftSettings, graphs: bool = True, by_slot: bool | None = None
    ) -> None:
        """Args:
        model: the network.
        settings: how trees are grown.
        graphs: record blocks as CUDA graphs over caches given to ``use_graphs``, on a CUDA device.
        by_slot: run blocks through ``SlotBlocks``; None does so on CUDA devices and with native layers.
        """
        self.model = model.pack()
        self.settings = settings
        self._fixed = FixedLimits(settings)
        self._fan_out = FanOutRule.of(settings, self.device)
        self.by_slot: SlotBlocks | None = None
        self._masks = MaskBlocks(model)
        pays = self.device.type == "cuda" or model.packs
        if by_slot or (by_slot is None and pays):
            self.by_slot = SlotBlocks(model, settings, self._fan_out, graphs and self.device.type == "cuda")

    @property
    def max_depth(self) -> int:
        """Deepest node a tree can have."""
        return self.num_blocks * self.model.config.num_slots

    @property
    def shares_noise(self) -> bool:
        """Whether ``draft`` wants the target's noise."""
        return self.settings.shared_noise

    @property
    def vocab_size(self) -> int:
        """Tokens of the target's vocabulary."""
        return self.model.config.vocab_size

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and features."""
        return self.model.lm_head.weight.dtype

    def parameter_groups(self) -> Mapping[str, tuple[str, ...]]:
        """Name -> patterns of the parameters an update may move."""
        return self.model.parameter_groups()

    @property
    def num_blocks(self) -> int:
        """Most forwards of a cycle; a network of independent slots has no later blocks."""
        return 1 if self.model.independent_slots else self.settings.blocks

    @property
    def scratch_rows(self) -> int:
        """Cache rows a cycle needs behind the finished positions."""
        return (self.num_blocks - 1) * self.settings.leaf_cap * self.model.config.num_slots

    def new_cache(self, num_slots: int, capacity_positions: int) -> DrafterCache:
        """A cache that fits this drafter's geometry, dtype and device."""
        # One more for the root's position, one more for the published refresh, which stores a position twice.
        width = self.model.config.num_slots
        padding = 0 if self.by_slot is None else max(POSITIONS[-1] * width, width + self.scratch_rows)
        return DrafterCache(
            self.model.config, num_slots, capacity_positions + 2, self.scratch_rows, self.dtype, self.device, padding
        )

    def use_graphs(self, cache: DrafterCache) -> None:
        """Records blocks over a cache that will serve for long, where there are graphs: each when first needed."""
        if self.by_slot is not None:
            self.by_slot.use_graphs(cache)

    @torch.no_grad()
    def refresh(self, cache: DrafterCache, slots: list[int], new: NewPositions) -> Tensor:
        """Appends the rows of new positions, every one computed from true target features.

        They are context: on CPUs that multiply bfloat16 numbers their rows are rounded, whatever those of a cycle are.

        Returns:
            u [B, 1, K, H] of each request's newest position (of padding, if it has none: finite and meaningless).
        """
        return self._absorb(cache, slots, self.paired(cache, slots, new))

    @torch.no_grad()
    def draft(
        self,
        cache: DrafterCache,
        slots: list[int],
        new: NewPositions,
        root_token: Tensor,
        sampling: SamplingBatch,
        noise: NoiseWindow | None,
        limits: Limits | None = None,
    ) -> Draft:
        """One cycle's drafting for all running requests.

        Args:
            cache: holds positions ``0 .. L-2-P`` of each request before, ``0 .. L-1`` after.
            slots: slot of each request.
            new: positions since the last cycle, oldest first; the last real one is (h_{L-1}, x_L).
            root_token: int64 [B], x_L.
            sampling: the requests' parameters; rows with temperature 0 are ranked by log q alone.
            noise: the target's Gumbel rows for positions L+1 .. L+max_depth, or None for no shared noise.
            limits: how many leaves and nodes; None takes the settings' fixed sizes.

        Returns:
            Trees within the limits. A request without any position yet gets its root only.
        """
        limits = limits or self._fixed
        if self.settings.published_refresh:
            new = published_positions(cache, slots, new)
        device = root_token.device
        after = [cache.positions_after(s, count) for s, count in zip(slots, new.counts, strict=True)]
        slots_B, root_index = on_device([slots, after], device)  # L, the root's index
        bias_rows = self.model.token_bias.rows([cache.domains[s] for s in slots])
        width = self.model.config.num_slots
        known = None if noise is None else noise.rows_from(slots, [index + 1 for index in after], width)
        ranking = Ranking(known, sampling, bias_rows)
        hidden_BnKH, proposals = self._first_block(cache, slots, new, ranking)
        leaves = root_leaf(hidden_BnKH, root_index > 0, width + self.scratch_rows)
        parts: list[Candidates] = []
        leaf_caps: list[int] = []
        for block in range(self.num_blocks):
            if block > 0:
                if not limits.more(block - 1):
                    break
                score = extendable(parts[-1], hidden_BnKH.shape[1], width)
                count = min(limits.leaves(block - 1, score), self.settings.leaf_cap)
                if count == 0:
                    break
                leaf_caps.append(count)
                offset = sum(part.token.shape[1] for part in parts[:-1])
                first_row = self._scratch_start(block - 1) if block > 1 else 0
                leaves = choose_leaves(parts[-1], hidden_BnKH, leaves, score, offset, first_row, count)
                ranking = Ranking(self._noise_rows(noise, slots_B, root_index, leaves.depth), sampling, bias_rows)
                hidden_BnKH, proposals = self._next_block(cache, slots, slots_B, leaves, block, ranking)
            if self.model.independent_slots:
                parts.append(expand_product(proposals, leaves.valid[:, 0], self.settings.beam))
            else:
                parts.append(expand_chain(proposals, leaves, sum(p.token.shape[1] for p in parts), block))
        candidates = concatenate(parts)
        budget = limits.nodes(candidates.score.masked_fill(~candidates.valid, -torch.inf))
        depth = len(parts) * width
        tree, offers = grow_tree(root_token, candidates, budget, depth, merge=self.settings.merge)
        return Draft(tree, DraftPlan(tuple(leaf_caps), budget), depth, offers)

    def _noise_rows(
        self, noise: NoiseWindow | None, slots_B: Tensor, root_index: Tensor, depth_Bn: Tensor
    ) -> NoiseRows | None:
        """Noise at the positions that the leaves' slots predict, B * n * K rows."""
        if noise is None:
            return None
        width = self.model.config.num_slots
        depth_BnK = depth_Bn[:, :, None] + torch.arange(1, width + 1, device=root_index.device)
        return noise.rows(slots_B[:, None, None], root_index[:, None, None] + depth_BnK)

    def paired(self, cache: DrafterCache, slots: list[int], new: NewPositions) -> NewPositions:
        """What is stored for new positions: they themselves."""
        return new

    def _absorb(self, cache: DrafterCache, slots: list[int], new: NewPositions) -> Tensor:
        if self.by_slot is not None and self.by_slot.whole_layers:
            found = self.by_slot.absorb(cache, slots, new)
        else:
            found = self._masks.first(cache, slots, new)
        self._advance(cache, slots, new)
        return found

    @staticmethod
    def _advance(cache: DrafterCache, slots: list[int], new: NewPositions) -> None:
        for slot, count in zip(slots, new.counts, strict=True):
            cache.advance(slot, count)

    def _first_block(
        self, cache: DrafterCache, slots: list[int], new: NewPositions, ranking: Ranking
    ) -> tuple[Tensor, Proposals]:
        """Refresh and block 1: u [B, 1, K, H] of each newest position and what it proposes."""
        new = self.paired(cache, slots, new)
        if self.by_slot is None or new.tokens.shape[1] > POSITIONS[-1]:
            hidden = self._masks.first(cache, slots, new)  # of these something is drafted: not as context
            self._advance(cache, slots, new)
            return hidden, propose(self.model, self.settings, self._fan_out, hidden, ranking, first=True)
        found = self.by_slot.first(cache, slots, new, ranking)
        self._advance(cache, slots, new)
        return found

    def _scratch_start(self, block: int) -> int:
        """First row of a later block (``block`` >= 1) behind the root position's first row."""
        return self.model.config.num_slots * (1 + (block - 1) * self.settings.leaf_cap)

    def _next_block(
        self, cache: DrafterCache, slots: list[int], slots_B: Tensor, leaves: Leaves, block: int, ranking: Ranking
    ) -> tuple[Tensor, Proposals]:
        """A later block: u [B, n, K, H] and what it proposes."""
        if self.by_slot is not None:
            return self.by_slot.later(cache, slots, leaves, self._scratch_start(block), ranking)
        hidden = self._masks.later(cache, slots, slots_B, leaves, self._scratch_start(block))
        return hidden, propose(self.model, self.settings, self._fan_out, hidden, ranking, first=False)

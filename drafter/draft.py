"""Block-iterative drafting: features of the last verification in, draft tree out.

Two forwards per cycle by default: refresh and block 1 in one, then all leaves of block 1 batched in block 2.

Legend: B requests, P new positions, K slots, n leaves, W fan-out width, S cache rows, Vd draft vocabulary.
Source: method reference 2.2, 3, 4 (tree), 5.4 (refresh pairing), 9.1-9.3; design 4 and 4.1 (shared noise).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specblock.cuda_ext.noise import NoiseWindow
from specblock.cuda_ext.ops import build_tree
from specblock.cuda_ext.sampling import SamplingBatch
from specblock.cuda_ext.tree import Candidates, DraftTree
from specblock.drafter.config import DraftSettings
from specblock.drafter.kv_cache import DrafterCache
from specblock.drafter.model import RANK_TOP, SpecBlockModel, masked_attention, rank_features

_FIRST_SLOT_CAPS = ((0.9, 3), (0.8, 5), (0.6, 8))
_OTHER_SLOT_CAPS = ((0.95, 2), (0.85, 3))


@dataclass(frozen=True, slots=True)
class NewPositions:
    """What the last verification yields for the drafter: pairs (feature, the token that follows it).

    Attributes:
        features: [B, P, F], padded at the end.
        tokens: int64 [B, P].
        counts: number of real positions per request (may be 0).
    """

    features: Tensor
    tokens: Tensor
    counts: list[int]


@dataclass(frozen=True, slots=True)
class _Leaves:
    """Open ends of the tree.

    node, depth, token int64 [B, n]; score, valid [B, n]; hidden [B, n, H]; seen bool [B, n, scratch rows].
    """

    node: Tensor
    depth: Tensor
    token: Tensor
    score: Tensor
    valid: Tensor
    hidden: Tensor
    seen: Tensor


@dataclass(frozen=True, slots=True)
class _Proposals:
    """Per slot the best W tokens: token int64 [.., K, W] (target ids), log_prob [.., K, W], fan_out int64 [.., K]."""

    token: Tensor
    log_prob: Tensor
    fan_out: Tensor


class SpecBlockDrafter:
    """Grows one tree per request and cycle from a :class:`SpecBlockModel` and its cache."""

    def __init__(self, model: SpecBlockModel, settings: DraftSettings) -> None:
        self.model = model
        self.settings = settings

    @property
    def max_depth(self) -> int:
        """Deepest node a tree can have."""
        return self.settings.blocks * self.model.config.num_slots

    @property
    def scratch_rows(self) -> int:
        """Cache rows a cycle needs behind the finished positions."""
        return (self.settings.blocks - 1) * self.settings.leaf_cap * self.model.config.num_slots

    def new_cache(self, num_slots: int, capacity_positions: int) -> DrafterCache:
        """A cache that fits this drafter's geometry, dtype and device."""
        weight = self.model.lm_head.weight
        return DrafterCache(
            self.model.config, num_slots, capacity_positions + 1, self.scratch_rows, weight.dtype, weight.device
        )

    @torch.no_grad()
    def absorb(self, cache: DrafterCache, slots: list[int], new: NewPositions) -> Tensor:
        """Refresh: appends the rows of new positions, every one computed from true target features.

        Returns:
            u [B, P, K, H] of the new positions (padding rows are finite and meaningless).
        """
        slots_B = torch.tensor(slots, device=new.tokens.device)
        base = torch.tensor([cache.positions[s] for s in slots], device=new.tokens.device)
        num_positions, width = new.tokens.shape[1], self.model.config.num_slots
        positions_BP = base[:, None] + torch.arange(num_positions, device=base.device)
        end = (max(cache.positions[s] for s in slots) + num_positions) * width
        row = base[:, None] * width + torch.arange(num_positions * width, device=base.device)
        in_order = cache.in_order(slots)
        mask_BTS = torch.arange(end, device=base.device) <= row[:, :, None]  # causal over rows (method reference 1.6)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = cache.write(layer, slots_B, in_order, base * width, key, value, end)
            return masked_attention(query, keys, values, mask_BTS)

        rotary = self.model.rotary_tables(self.model.rotary_index(positions_BP))
        hidden = self.model.run_layers(self.model.first_inputs(new.features, new.tokens), rotary, attend)
        for slot, count in zip(slots, new.counts, strict=True):
            cache.positions[slot] += count
        return hidden

    @torch.no_grad()
    def draft(
        self,
        cache: DrafterCache,
        slots: list[int],
        new: NewPositions,
        root_token: Tensor,
        sampling: SamplingBatch,
        noise: NoiseWindow | None,
    ) -> DraftTree:
        """One cycle's drafting for all running requests.

        Args:
            cache: holds positions ``0 .. L-2-P`` of each request before, ``0 .. L-1`` after.
            slots: slot of each request.
            new: positions since the last cycle, oldest first; the last real one is (h_{L-1}, x_L).
            root_token: int64 [B], x_L.
            sampling: the requests' parameters; rows with temperature 0 are ranked by log q alone.
            noise: the target's Gumbel rows for positions L+1 .. L+max_depth, or None for no shared noise.

        Returns:
            A tree over at most ``node_budget`` drafts. A request without any position yet gets its root only.
        """
        hidden_BPKH = self.absorb(cache, slots, new)
        device, width = root_token.device, self.model.config.num_slots
        last = torch.tensor([max(0, count - 1) for count in new.counts], device=device)
        hidden_BnKH = hidden_BPKH[torch.arange(len(slots), device=device), last][:, None]
        root_index = torch.tensor([cache.positions[s] for s in slots], device=device)  # L, index of the root token
        slots_B = torch.tensor(slots, device=device)
        leaves = self._root_leaf(hidden_BnKH, root_index > 0)
        parts: list[Candidates] = []
        offset = 0
        for block in range(self.settings.blocks):
            if block > 0:
                leaves = self._choose_leaves(parts[-1], hidden_BnKH, leaves, block, offset - parts[-1].token.shape[1])
                hidden_BnKH = self._later_block(cache, slots, slots_B, leaves, block)
            depth_BnK = leaves.depth[:, :, None] + torch.arange(1, width + 1, device=device)
            gumbel = (
                None if noise is None else noise.rows(slots_B[:, None, None], root_index[:, None, None] + depth_BnK)
            )
            proposals = self._propose(hidden_BnKH, gumbel, sampling, first=block == 0)
            parts.append(self._expand(proposals, leaves, offset, block))
            offset += parts[-1].token.shape[1]
        return build_tree(root_token, _concatenate(parts), self.settings.node_budget, self.max_depth)

    def _root_leaf(self, hidden_BnKH: Tensor, started: Tensor) -> _Leaves:
        """The root as the single leaf that block 1 extends."""
        column = torch.zeros_like(started, dtype=torch.int64)[:, None]
        scratch = self.model.config.num_slots + self.scratch_rows
        return _Leaves(
            node=column - 1,
            depth=column,
            token=column,
            score=column.to(torch.float32),
            valid=started[:, None],
            hidden=hidden_BnKH[:, :, 0],
            seen=torch.zeros(*column.shape, scratch, dtype=torch.bool, device=column.device),
        )

    def _propose(self, hidden_BnKH: Tensor, gumbel: Tensor | None, sampling: SamplingBatch, first: bool) -> _Proposals:
        """Best tokens, their log-probabilities and the fan-out of every slot (method reference section 3)."""
        normed = self.model.norm(hidden_BnKH)
        logits = self.model.lm_head(normed).to(torch.float32)
        top = torch.topk(logits, min(RANK_TOP, logits.shape[-1]), dim=-1).values
        width = self.settings.beam if first else max(self.settings.fan_out)
        width = min(width, logits.shape[-1])
        if gumbel is None:
            best = torch.topk(logits, width, dim=-1)
            log_prob = best.values - torch.logsumexp(logits, dim=-1, keepdim=True)
        else:
            if not self.model.full_vocabulary:
                gumbel = gumbel[..., self.model.draft_ids]
            score = perturbed(logits, top, gumbel.to(torch.float32), sampling, self.settings.noise_scale)
            best = torch.topk(score, width, dim=-1)
            log_prob = best.values - torch.logsumexp(score, dim=-1, keepdim=True)
        # A draft vocabulary below 20 tokens pads the features; the classes then never reach past it.
        padded = torch.nn.functional.pad(top, (0, RANK_TOP - top.shape[-1]), value=-1e4)
        rank = self.model.rank_logits(normed, rank_features(padded)).argmax(dim=-1)
        fan_out = self._fan_out(rank, log_prob[..., 0].exp(), first)
        return _Proposals(self.model.draft_ids[best.indices], log_prob, fan_out)

    def _fan_out(self, rank_BnK: Tensor, greedy_p_BnK: Tensor, first: bool) -> Tensor:
        """Tokens kept per slot, the greedy one included; 0 from the first slot that gives up onward."""
        table = torch.tensor(self.settings.fan_out, device=rank_BnK.device)
        fan_out = table[rank_BnK]
        open_slots = fan_out > 0
        for limit, cap in reversed(_OTHER_SLOT_CAPS):
            fan_out = torch.where(greedy_p_BnK >= limit, fan_out.clamp(max=cap), fan_out)
        if first:
            slot_0 = torch.full_like(fan_out[..., 0], self.settings.beam)
            for limit, cap in reversed(_FIRST_SLOT_CAPS):
                slot_0 = torch.where(greedy_p_BnK[..., 0] >= limit, min(cap, self.settings.beam), slot_0)
            fan_out = torch.cat([slot_0[..., None], fan_out[..., 1:]], dim=-1)
            open_slots = torch.cat([torch.ones_like(open_slots[..., :1]), open_slots[..., 1:]], dim=-1)
        return fan_out * torch.cumprod(open_slots.to(fan_out.dtype), dim=-1)

    def _expand(self, proposals: _Proposals, leaves: _Leaves, offset: int, block: int) -> Candidates:
        """Nodes of one block: a greedy chain of K and alternatives at every slot (method reference 4.1)."""
        batch, num_leaves, width_k, width_w = proposals.token.shape
        device = proposals.token.device
        slot_K = torch.arange(width_k, device=device)
        chain = torch.cumsum(proposals.log_prob[..., 0], dim=-1) - proposals.log_prob[..., 0]
        score = leaves.score[:, :, None, None] + chain[..., None] + proposals.log_prob
        own = offset + (torch.arange(num_leaves, device=device)[:, None] * width_k + slot_K - 1) * width_w
        parent = torch.where(slot_K == 0, leaves.node[:, :, None], own)[..., None]
        depth = (leaves.depth[:, :, None] + slot_K + 1)[..., None]
        kept = torch.arange(width_w, device=device) < proposals.fan_out.clamp(min=1)[..., None]
        valid = kept & leaves.valid[:, :, None, None] & torch.isfinite(score)

        def flat(values: Tensor) -> Tensor:
            return values.expand(batch, num_leaves, width_k, width_w).reshape(batch, -1)

        return Candidates(
            token=flat(proposals.token),
            parent=flat(parent),
            score=flat(score),
            depth=flat(depth),
            block=flat(torch.full((1, 1, 1, 1), block, device=device)),
            slot=flat(slot_K[:, None]),
            valid=flat(valid & ~_below_dead_chain(valid)),
        )

    def _choose_leaves(
        self, nodes: Candidates, hidden_BnKH: Tensor, parents: _Leaves, block: int, offset: int
    ) -> _Leaves:
        """The ``leaf_cap`` best-scoring nodes of the last block that may be extended (method reference 4.2)."""
        batch, num_parents, width_k, _ = hidden_BnKH.shape
        grid = nodes.valid.view(batch, num_parents, width_k, -1)
        width_w = grid.shape[-1]
        extendable = grid & (grid.sum(dim=-1, keepdim=True) > 1)
        extendable[:, :, -1, 0] = grid[:, :, -1, 0]
        score = nodes.score.masked_fill(~extendable.flatten(1), -torch.inf)
        best = torch.topk(score, min(self.settings.leaf_cap, score.shape[1]), dim=1)
        index = best.indices
        source, slot = index // (width_k * width_w), (index // width_w) % width_k
        rows = torch.arange(batch, device=index.device)[:, None]
        first_row = 0 if block == 1 else width_k + (block - 2) * self.settings.leaf_cap * width_k
        scratch = torch.arange(parents.seen.shape[-1], device=index.device)
        start = (first_row + source * width_k)[..., None]
        return _Leaves(
            node=offset + index,
            depth=nodes.depth.gather(1, index),
            token=nodes.token.gather(1, index),
            score=torch.where(torch.isfinite(best.values), best.values, 0.0),
            valid=torch.isfinite(best.values),
            hidden=hidden_BnKH[rows, source, slot],
            seen=parents.seen[rows, source] | ((scratch >= start) & (scratch <= start + slot[..., None])),
        )

    def _later_block(
        self, cache: DrafterCache, slots: list[int], slots_B: Tensor, leaves: _Leaves, block: int
    ) -> Tensor:
        """One batched forward over all leaves: u [B, n, K, H]. Nothing is appended to the finished positions."""
        width, device = self.model.config.num_slots, slots_B.device
        num_leaves = leaves.token.shape[1]
        positions = torch.tensor([cache.positions[s] for s in slots], device=device)
        first_row = width + (block - 1) * self.settings.leaf_cap * width  # relative to the root position's rows
        root_row = (positions - 1) * width
        start = root_row + first_row
        end = max(cache.positions[s] for s in slots) * width - width + first_row + num_leaves * width
        in_order = cache.in_order(slots)
        scratch = torch.arange(leaves.seen.shape[-1], device=device)
        own = first_row + torch.arange(num_leaves * width, device=device).view(num_leaves, width)
        causal = (scratch >= own[:, :1, None]) & (scratch <= own[:, :, None])  # [n, K, scratch]
        visible = (leaves.seen[:, :, None] | causal).flatten(1, 2)
        relative = torch.arange(end, device=device) - root_row[:, None]  # [B, end]
        inside = (relative >= 0) & (relative < scratch.shape[0])
        index = relative.clamp(0, scratch.shape[0] - 1)[:, None].expand(-1, visible.shape[1], -1)
        mask = (relative < 0)[:, None] | (inside[:, None] & visible.gather(2, index))

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = cache.write(layer, slots_B, in_order, start, key, value, end)
            return masked_attention(query, keys, values, mask)

        rotary = self.model.rotary_tables(self.model.rotary_index((positions - 1)[:, None].expand(-1, num_leaves)))
        return self.model.run_layers(self.model.later_inputs(leaves.hidden, leaves.token), rotary, attend)


def perturbed(logits: Tensor, top: Tensor, gumbel: Tensor, sampling: SamplingBatch, scale: float) -> Tensor:
    """Draft logits ranked with the target's own noise: ``(log q / T + Gumbel) / scale`` for sampled rows.

    The target will choose arg-max(log p + Gumbel); with the noise known, what is uncertain is only how far q is from
    p. ``scale`` is that distance in nats, so the result reads as the drafter's log-odds of the target's choice.
    Tokens that the request's top-k, min-p or top-p surely remove are dropped (top-p only where the 20 best decide it).

    Args:
        logits: float32 [B, n, K, Vd].
        top: float32 [B, n, K, 20], the largest of them, descending.
        gumbel: float32 [B, n, K, Vd].
        sampling: parameters of the B requests.
        scale: nats.

    Returns:
        float32 [B, n, K, Vd]; greedy rows are the logits themselves.
    """
    greedy = (sampling.temperature == 0).view(-1, 1, 1, 1)
    temperature = sampling.temperature.to(torch.float32).view(-1, 1, 1, 1)
    temperature = torch.where(greedy, 1.0, temperature)
    scaled, scaled_top = logits / temperature, top / temperature
    normaliser = torch.logsumexp(scaled, dim=-1, keepdim=True)
    before = torch.cumsum((scaled_top - normaliser).exp(), dim=-1) - (scaled_top - normaliser).exp()
    kept = before < sampling.top_p.to(torch.float32).view(-1, 1, 1, 1)
    floor = torch.where(kept, scaled_top, torch.inf).amin(dim=-1, keepdim=True)
    floor = torch.where(kept.all(dim=-1, keepdim=True), -torch.inf, floor)
    floor = torch.maximum(floor, scaled_top[..., :1] + sampling.min_p.to(torch.float32).view(-1, 1, 1, 1).log())
    top_k = sampling.top_k.view(-1, 1, 1, 1).expand(*top.shape[:-1], 1)
    by_rank = scaled_top.gather(-1, top_k.clamp(1, top.shape[-1]) - 1)
    floor = torch.where((top_k > 0) & (top_k <= top.shape[-1]), torch.maximum(floor, by_rank), floor)
    score = ((scaled + gumbel) / scale).masked_fill(scaled < floor, -torch.inf)
    return torch.where(greedy, logits, score)


def _below_dead_chain(valid: Tensor) -> Tensor:
    """bool [B, n, K, W]: nodes whose greedy ancestor in the block is missing (a filtered token cannot be a parent)."""
    alive = torch.cumprod(valid[..., 0].to(torch.int8), dim=-1).to(torch.bool)
    above = torch.cat([torch.ones_like(alive[..., :1]), alive[..., :-1]], dim=-1)
    return ~above[..., None]


def _concatenate(parts: list[Candidates]) -> Candidates:
    names = Candidates.__dataclass_fields__
    return Candidates(**{name: torch.cat([getattr(part, name) for part in parts], dim=1) for name in names})

"""A drafter's blocks in fixed shapes: slots, lengths and what is seen are data on the device.

The counterpart of ``BlockDrafter``'s own forwards: the attention reads the whole storage, so that a block can be
recorded as a graph on CUDA devices, and a layer is one native call on CPUs.

Legend: B requests, P new positions, K slots, T = P * K rows, n leaves, W rows of the cycle so far, H hidden.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from specblock.cuda_ext.linear import can_pack
from specblock.cuda_ext.noise import NoiseRows
from specblock.cuda_ext.rotary_tables import RotaryTables
from specblock.cuda_ext.sampling import SamplingBatch
from specblock.cuda_ext.transfer import on_device
from specblock.drafter.config import DraftSettings
from specblock.drafter.expand import Leaves
from specblock.drafter.fan_out import FanOutRule
from specblock.drafter.graphs import BlockGraphs, Tensors
from specblock.drafter.interface import NewPositions
from specblock.drafter.kv_cache import DrafterCache
from specblock.drafter.network import DraftNetwork
from specblock.drafter.proposals import Proposals, Ranking, propose
from specblock.drafter.row_constants import causal, row_offsets
from specblock.drafter.slot_attend import SlotAttend

_ROTARY_AHEAD = 64  # rotary indices behind those of a cache's positions, for what is drafted at its end
POSITIONS = (1, 2, 4, 8, 16)
"""New positions that one forward takes; more are absorbed the other way."""


class SlotBlocks:
    """Block 1 and later blocks of a network over the slots of a cache.

    Attributes:
        graphs: whether to record them; may be changed at any time.
    """

    def __init__(self, network: DraftNetwork, settings: DraftSettings, rule: FanOutRule, graphs: bool) -> None:
        self.graphs = graphs
        self._network, self._settings, self._rule = network, settings, rule
        self._packs = network.packs
        self._tables = RotaryTables(network.rotary_tables)
        self._recorded: weakref.WeakKeyDictionary[DrafterCache, BlockGraphs] = weakref.WeakKeyDictionary()

    @property
    def num_graphs(self) -> int:
        """Graphs over all caches."""
        return sum(map(len, self._recorded.values()))

    @property
    def num_failures(self) -> int:
        """Recordings that failed, over all caches."""
        return sum(graphs.failures for graphs in self._recorded.values())

    @property
    def whole_layers(self) -> bool:
        """Whether a layer is one native call; no longer after the network was cast to another type."""
        return self._packs and can_pack(self._network.lm_head.weight)

    def graphs_over(self, cache: DrafterCache) -> BlockGraphs | None:
        """The graphs over one cache, which go when it goes; None before ``use_graphs``, or if there are to be none."""
        return self._recorded.get(cache) if self.graphs else None

    def use_graphs(self, cache: DrafterCache) -> None:
        """From now on blocks over this cache are recorded: it will serve for longer than that takes."""
        if cache not in self._recorded and cache.keys.is_cuda:
            self._recorded[cache] = BlockGraphs(cache.keys.device, len(cache.positions))

    def first(
        self, cache: DrafterCache, slots: Sequence[int], new: NewPositions, ranking: Ranking
    ) -> tuple[Tensor, Proposals]:
        """Block 1: u [B, 1, K, H] of each newest position, and what it proposes. All rows are stored.

        The counters of the cache are the caller's to advance, afterwards.
        """
        width, most, tokens, features = self._network.config.num_slots, new.tokens.shape[1], new.tokens, new.features
        if not self.whole_layers:  # graphs want few sizes
            most = next(p for p in POSITIONS if p >= tokens.shape[1])
            more = most - tokens.shape[1]
            tokens, features = F.pad(tokens, (0, more)), F.pad(features, (0, 0, 0, more))
        counters = [
            (1, slot, cache.room(slot, count) * width, cache.rotary[slot], max(0, count - 1))
            for slot, count in zip(slots, new.counts, strict=True)
        ]
        inputs = (on_device(counters, tokens.device), features, tokens)

        def body(given: Tensors) -> Tensor:
            numbers, features, tokens = given
            return self._first_rows(cache, numbers, features, tokens)

        return self._run(cache, ("first", most), body, inputs, ranking, first=True)

    def absorb(self, cache: DrafterCache, slots: Sequence[int], new: NewPositions) -> Tensor:
        """Block 1 of any number of positions, as context: rows rounded, nothing proposed. Whole layers only.

        Returns:
            u [B, 1, K, H] of each newest position; zeros for requests without any.
        """
        width = self._network.config.num_slots
        found = new.features.new_zeros(len(slots), 1, width, self._network.config.hidden_size)
        with self._network.coarsely():
            # One by one: prompts differ in length, and padding would be computed.
            for row, (slot, count) in enumerate(zip(slots, new.counts, strict=True)):
                if count:
                    own = (1, slot, cache.room(slot, count) * width, cache.rotary[slot], count - 1)
                    given = (new.features[row : row + 1, :count], new.tokens[row : row + 1, :count])
                    found[row] = self._first_rows(cache, on_device([own], new.tokens.device), *given)[0]
        return found

    def later(
        self, cache: DrafterCache, slots: Sequence[int], leaves: Leaves, first_row: int, ranking: Ranking
    ) -> tuple[Tensor, Proposals]:
        """A later block over all leaves: u [B, n, K, H] and what it proposes.

        Args:
            cache: its counters stand behind block 1.
            slots: slot of each request.
            leaves: what the block extends.
            first_row: the block's first row behind the root position's first row.
            ranking: how proposals are ranked.
        """
        width, num_leaves = self._network.config.num_slots, leaves.token.shape[1]
        end = first_row + num_leaves * width  # W
        roots = [max(0, cache.rows[slot] - 1) * width for slot in slots]  # 0: nothing to draft from, and nothing is
        counters = [(1, slot, root, cache.last_rotary[slot]) for slot, root in zip(slots, roots, strict=True)]
        seen = leaves.seen[:, :, :end]
        inputs = (on_device(counters, seen.device), leaves.hidden, leaves.token, leaves.depth, seen)

        def body(given: Tensors) -> Tensor:
            numbers, hidden, token, depth, seen = given
            real, slot_B, root_row, rotary = (column.contiguous() for column in numbers.unbind(1))
            visible = self._visible(seen, first_row)
            attend = self._attend(cache, slot_B, root_row, visible, real)
            index = self._network.rotary_index(rotary[:, None].expand(-1, num_leaves), depth)
            tables = self._rotary(cache, index)
            return self._network.run_layers(self._network.later_inputs(hidden, token), tables, attend)

        return self._run(cache, ("later", first_row, num_leaves), body, inputs, ranking, first=False)

    def _first_rows(self, cache: DrafterCache, numbers: Tensor, features: Tensor, tokens: Tensor) -> Tensor:
        """Block 1 of features [B, P, F] and tokens [B, P]: u [B, 1, K, H] of the newest positions.

        Args:
            cache: where the rows go.
            numbers: int64 [B, 5]: 0 for requests that only fill up a batch, slot, first row, rotary index of the first
                position, number of the newest one.
            features: of the target.
            tokens: that follow them.
        """
        real, slot_B, base, rotary, newest = (column.contiguous() for column in numbers.unbind(1))
        (batch, count), device = tokens.shape, tokens.device
        visible = causal(batch, count * self._network.config.num_slots, device)
        attend = self._attend(cache, slot_B, base, visible, real)
        index = rotary[:, None] + row_offsets(count, self._network.config.num_slots, device)
        tables, inputs = self._rotary(cache, index), self._network.first_inputs(features, tokens)
        u = self._network.run_layers(inputs, tables, attend, newest if self.whole_layers else None)
        return u if u.shape[1] == 1 else u[torch.arange(batch, device=device), newest][:, None]

    def _visible(self, seen_BnW: Tensor, first_row: int) -> Tensor:
        """bool [B, n * K, W]: a leaf's rows see what it has seen and its own so far."""
        num_leaves, end = seen_BnW.shape[1:]
        column = torch.arange(end, device=seen_BnW.device)
        own = column[first_row:].view(num_leaves, -1)
        causal = (column >= own[:, :1, None]) & (column <= own[:, :, None])  # [n, K, W]
        return (seen_BnW[:, :, None] | causal).flatten(1, 2)

    def _attend(
        self, cache: DrafterCache, slot_B: Tensor, first_B: Tensor, visible_BTW: Tensor, real_B: Tensor
    ) -> SlotAttend:
        if self.whole_layers:
            return SlotAttend(cache, slot_B, first_B, visible_BTW, whole_layers=True)
        # Requests that only fill up a batch write behind everything, where nobody reads.
        write_B = torch.where(real_B > 0, first_B, cache.keys.shape[3] - cache.padding_rows)
        return SlotAttend(cache, slot_B, first_B, visible_BTW, write_B)

    def _rotary(self, cache: DrafterCache, index_BT: Tensor) -> tuple[Tensor, Tensor]:
        """``rotary_tables``, looked up where they would be computed anew in every cycle."""
        if not self.whole_layers:
            return self._network.rotary_tables(index_BT)
        positions = cache.keys.shape[3] // self._network.config.num_slots
        # The published refresh skips indices, at most one per position.
        cos, sin = self._tables.of(index_BT, 2 * positions + _ROTARY_AHEAD)
        return cos[:, None], sin[:, None]

    def _run(
        self,
        cache: DrafterCache,
        key: tuple[Any, ...],
        body: Callable[[Tensors], Tensor],
        inputs: Tensors,
        ranking: Ranking,
        first: bool,
    ) -> tuple[Tensor, Proposals]:
        """``body(inputs)``, u, and what it proposes: as a graph where there is one."""
        graphs, found = self.graphs_over(cache), None
        if graphs is not None:
            noise, count = ranking.noise, len(inputs)

            def whole(given: Tensors) -> Tensors:
                return self._proposed(body(given[:count]), given[count:], ranking, first)

            data = tuple(getattr(ranking.sampling, name) for name in SamplingBatch.__dataclass_fields__)
            data += () if noise is None else (noise.index.view(inputs[0].shape[0], -1),)
            data += () if ranking.bias_rows is None else (ranking.bias_rows,)
            store = None if noise is None else noise.storage.data_ptr()
            found = graphs.run((*key, store, ranking.bias_rows is None), whole, inputs + data)
        if found is not None:
            return found[0], Proposals(*found[1:])
        hidden = body(inputs)
        return hidden, propose(self._network, self._settings, self._rule, hidden, ranking, first)

    def _proposed(self, hidden: Tensor, data: Tensors, like: Ranking, first: bool) -> Tensors:
        """``propose`` with the tensors that ``_run`` put behind a body's own."""
        fields = len(SamplingBatch.__dataclass_fields__)
        sampling, others = SamplingBatch(*data[:fields]), list(data[fields:])
        noise = None if like.noise is None else NoiseRows(like.noise.storage, others.pop(0).flatten())
        bias_rows = None if like.bias_rows is None else others.pop(0)
        ranking = Ranking(noise, sampling, bias_rows)
        found = propose(self._network, self._settings, self._rule, hidden, ranking, first)
        return hidden, found.token, found.log_prob, found.fan_out

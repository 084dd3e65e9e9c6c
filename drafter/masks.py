"""A drafter's blocks under explicit masks: the readable forwards, for every device and type.

Legend: B requests, P new positions, K slots, T = P * K rows, n leaves, S cache rows.
Source: method reference 1.6 (mask), 2.2, 5.4 (refresh pairing).
"""

from __future__ import annotations

import torch
from torch import Tensor

from specblock.cuda_ext.attention import tree_attention
from specblock.cuda_ext.transfer import on_device
from specblock.drafter.expand import Leaves
from specblock.drafter.interface import NewPositions
from specblock.drafter.kv_cache import DrafterCache
from specblock.drafter.layers import rows_of, take_rows
from specblock.drafter.network import DraftNetwork


class MaskBlocks:
    """Block 1 and later blocks of a network."""

    def __init__(self, network: DraftNetwork) -> None:
        self._network = network

    def first(self, cache: DrafterCache, slots: list[int], new: NewPositions) -> Tensor:
        """Stores the rows of new positions; u [B, 1, K, H] of each request's newest one.

        The counters of the cache are the caller's to advance, afterwards.
        """
        newest_position = [max(0, count - 1) for count in new.counts]
        numbers = [slots, [cache.rows[s] for s in slots], [cache.rotary[s] for s in slots], newest_position]
        slots_B, base, rotary_base, newest = on_device(numbers, new.tokens.device)
        num_positions, width = new.tokens.shape[1], self._network.config.num_slots
        order_P = torch.arange(num_positions, device=base.device)
        # Padding may reach further than this, even out of the storage: nothing looks at it.
        end = max(1, *(cache.rows[s] + count for s, count in zip(slots, new.counts, strict=True))) * width
        row = base[:, None] * width + torch.arange(num_positions * width, device=base.device)
        in_order = cache.in_order(slots)
        mask_BTS = torch.arange(end, device=base.device) <= row[:, :, None]  # causal over rows (method reference 1.6)
        newest_rows = rows_of(newest, num_positions, width)
        newest_mask = mask_BTS if newest_rows is None else take_rows(mask_BTS, newest_rows)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = cache.write(layer, slots_B, in_order, base * width, key, value, end)
            everyone = query.shape[2] == mask_BTS.shape[1]
            return tree_attention(query, keys, values, mask_BTS if everyone else newest_mask)

        rotary = self._network.rotary_tables(self._network.rotary_index(rotary_base[:, None] + order_P))
        inputs = self._network.first_inputs(new.features, new.tokens)
        return self._network.run_layers(inputs, rotary, attend, newest)

    def later(self, cache: DrafterCache, slots: list[int], slots_B: Tensor, leaves: Leaves, first_row: int) -> Tensor:
        """One batched forward over all leaves: u [B, n, K, H]. Nothing is appended to the finished positions.

        Args:
            cache: its counters stand behind block 1.
            slots: slot of each request.
            slots_B: the same on the device.
            leaves: what the block extends.
            first_row: the block's first row behind the root position's first row.
        """
        width, device = self._network.config.num_slots, slots_B.device
        num_leaves = leaves.token.shape[1]
        numbers = [[(cache.rows[s] - 1) * width for s in slots], [cache.last_rotary[s] for s in slots]]
        root_row, root_rotary = on_device(numbers, device)
        start = root_row + first_row
        end = (max(cache.rows[s] for s in slots) - 1) * width + first_row + num_leaves * width
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
            return tree_attention(query, keys, values, mask)

        positions = root_rotary[:, None].expand(-1, num_leaves)
        rotary = self._network.rotary_tables(self._network.rotary_index(positions, leaves.depth))
        inputs = self._network.later_inputs(leaves.hidden, leaves.token)
        return self._network.run_layers(inputs, rotary, attend)

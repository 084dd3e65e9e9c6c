"""The drafter's key/value cache: K rotated rows per finished position, plus scratch rows of the current cycle.

Rows are position-major (row ``i * K + k``), so the first-block mask is plain causality over rows. Rows behind the
finished positions are scratch: later blocks write there and the next refresh overwrites them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specblock.drafter.config import DrafterConfig
from specblock.drafter.token_bias import domain_key


class DrafterCache:
    """Storage ``[layers, slots, kv_heads, rows, head_dim]`` and counters per slot.

    Attributes:
        positions: finished positions; position i is the pair (h_i, x_{i+1}).
        padding_rows: rows of each slot at the very end, for what nobody reads: of requests that only fill up a batch,
            and of those that have fewer new positions than others in it.
        rows: stored positions, and rotary: index of the next one. Both equal ``positions`` unless the published
            refresh is imitated, which stores some twice and skips indices.
        domains: ``domain_key`` of each slot's kind of text.
        last_rotary: rotary index of the newest stored position.
        drafted, surplus: bookkeeping of that imitation: whether the slot has drafted yet; rows that the next
            ``advance`` holds beyond true positions, and rotary steps it makes beyond its rows.
    """

    def __init__(
        self,
        config: DrafterConfig,
        num_slots: int,
        capacity_positions: int,
        scratch_rows: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        padding_rows: int = 0,
    ) -> None:
        # The one behind scratch rows takes padding, and so do the rows behind it.
        rows = capacity_positions * config.num_slots + scratch_rows + 1 + padding_rows
        self.padding_rows, self._scratch_rows, self._width = padding_rows, scratch_rows, config.num_slots
        shape = (config.num_hidden_layers, num_slots, config.num_key_value_heads, rows, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.positions = [0] * num_slots
        self.rows = [0] * num_slots
        self.rotary = [0] * num_slots
        self.domains = [domain_key("")] * num_slots
        self.last_rotary = [-1] * num_slots
        self.drafted = [False] * num_slots
        self.surplus = [(0, 0)] * num_slots

    def advance(self, slot: int, count: int) -> None:
        """Counts ``count`` newly stored positions."""
        twice, skipped = self.surplus[slot]
        self.positions[slot] += count - twice
        self.rows[slot] += count
        self.last_rotary[slot] = self.rotary[slot] + count - 1
        self.rotary[slot] += count + skipped
        self.surplus[slot] = (0, 0)

    def positions_after(self, slot: int, count: int) -> int:
        """Finished positions of a slot once ``advance`` has counted ``count``."""
        return self.positions[slot] + count - self.surplus[slot][0]

    def room(self, slot: int, count: int) -> int:
        """Stored positions of a slot, behind which ``count`` more have room."""
        end = self.keys.shape[3] - self.padding_rows - self._scratch_rows - 1
        assert (self.rows[slot] + count) * self._width <= end, (
            "drafter cache overflow: the scheduler must check capacity"
        )
        return self.rows[slot]

    def put(self, layer: int, slots_B: Tensor, rows_BT: Tensor, keys: Tensor, values: Tensor) -> None:
        """Writes rows ``[B, kv_heads, T, D]`` at ``rows_BT`` int64 [B, T], all of which the storage has."""
        self.keys[layer][slots_B[:, None], :, rows_BT] = keys.transpose(1, 2)
        self.values[layer][slots_B[:, None], :, rows_BT] = values.transpose(1, 2)

    def reset(self, slot: int, domain: str = "") -> None:
        """Forgets a slot, whose next text is of ``domain``; stale rows stay finite and are masked."""
        self.domains[slot] = domain_key(domain)
        self.positions[slot] = self.rows[slot] = self.rotary[slot] = 0
        self.last_rotary[slot], self.drafted[slot], self.surplus[slot] = -1, False, (0, 0)

    def in_order(self, slots: list[int]) -> bool:
        """True when ``slots`` is every slot of the storage, first to last."""
        return slots == list(range(len(self.positions)))

    @property
    def num_bytes(self) -> int:
        """Bytes of both storages."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def write(
        self, layer: int, slots: Tensor, in_order: bool, start: Tensor, keys: Tensor, values: Tensor, end: int
    ) -> tuple[Tensor, Tensor]:
        """Writes rows ``[B, kv_heads, T, D]`` at ``start[b] ..`` and returns both storages up to row ``end``.

        Args:
            layer: decoder layer.
            slots: int64 [B].
            in_order: :meth:`in_order` of them; then views are returned instead of gathered copies.
            start: int64 [B], first row to write.
            keys: [B, kv_heads, T, D], already rotated.
            values: [B, kv_heads, T, D].
            end: number of rows to return, at least as many as hold anything real. Rows that do not fit the storage
                are padding of a batch in which another request has more new positions; they are dropped.

        Returns:
            Keys and values [B, kv_heads, end, D].
        """
        last = self.keys.shape[3] - 1
        assert end <= last, "drafter cache overflow: the scheduler must check capacity first"
        rows = (start[:, None] + torch.arange(keys.shape[2], device=keys.device)).clamp(max=last)
        layer_keys, layer_values = self.keys[layer], self.values[layer]
        layer_keys[slots[:, None], :, rows] = keys.transpose(1, 2)
        layer_values[slots[:, None], :, rows] = values.transpose(1, 2)
        if in_order:
            return layer_keys[:, :, :end], layer_values[:, :, :end]
        return layer_keys[slots, :, :end], layer_values[slots, :, :end]

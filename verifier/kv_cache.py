"""The target's key/value cache: static storage per slot, staged rows behind a committed prefix.

A forward writes its rows at ``length .. length + R`` of each slot without moving the length: they are *staged*. Only
``commit`` (a path through a tree) or ``advance`` (a chain) makes them part of the prefix, so a rejected draft costs
nothing to undo. Lengths live on the host: no operation here waits for the device.

Legend: L layers, S slots, G key/value heads, C capacity in tokens, D head size, B requests in the batch, R new rows,
T tokens visible to the batch, A rows of an accepted path.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from specblock.cuda_ext.ops import commit_rows
from specblock.cuda_ext.transfer import on_device


@dataclass(slots=True)
class _Staging:
    """Where the forward under way writes and reads: set once per forward, followed by every layer.

    After ``stage_on_device`` everything is read: the attention picks slots and lengths itself.
    """

    read: slice | Tensor
    write_slots: slice | Tensor
    write_positions: slice | Tensor
    visible_tokens: int


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of the cache in the shape transformers expects."""

    is_sliding = False

    def __init__(self, keys_SGCD: Tensor, values_SGCD: Tensor, owner: TargetCache) -> None:
        super().__init__()
        self.keys, self.values = keys_SGCD, values_SGCD
        self.is_initialized = True
        self._owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The storage exists from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Writes staged rows [B, G, R, D] and returns everything visible [B, G, T, D] (a view where possible)."""
        plan = self._owner.staging
        assert plan is not None, "stage() must precede the forward"
        aligned = isinstance(plan.write_positions, slice)
        for storage, rows in ((self.keys, key_states), (self.values, value_states)):
            # Index tensors around a slice put the indexed axes first, hence the transposition.
            storage[plan.write_slots, :, plan.write_positions] = rows if aligned else rows.transpose(1, 2)
        return self.keys[plan.read, :, : plan.visible_tokens], self.values[plan.read, :, : plan.visible_tokens]

    def places(self) -> tuple[Tensor, Tensor]:
        """Slots int64 [B] and positions int64 [B, R] that the staged rows go to, after ``stage_on_device``."""
        plan = self._owner.staging
        assert plan is not None, "stage_on_device() must precede the forward"
        assert isinstance(plan.write_slots, Tensor) and isinstance(plan.write_positions, Tensor)
        return plan.write_slots[:, 0], plan.write_positions

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the visible keys (unused with an explicit 4-D mask)."""
        return self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        """Visible tokens of the batch under way, staged rows included."""
        return self._owner.staging.visible_tokens if self._owner.staging else 0

    def get_max_length(self) -> int:
        """Capacity of one slot in tokens."""
        return int(self.keys.shape[2])


class TargetCache:
    """Keys and values of every slot, with exact rollback.

    Attributes:
        keys: [L, S, G, C + padding rows, D]; zero-initialised, so that masked entries are always finite.
        values: the same.
        lengths: committed tokens per slot (host).
        padding_rows: positions of each slot behind its capacity, to write what nobody reads.
        as_transformers: the same storage behind transformers' ``Cache`` interface.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        capacity_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        padding_rows: int = 0,
    ) -> None:
        if num_slots < 1 or capacity_tokens < 1:
            raise ValueError(f"a cache needs slots and capacity, got {num_slots} slots of {capacity_tokens} tokens")
        self.padding_rows = padding_rows
        shape = (num_layers, num_slots, num_kv_heads, capacity_tokens + padding_rows, head_dim)
        # Tensors born in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.keys = torch.zeros(shape, dtype=dtype, device=device)
            self.values = torch.zeros(shape, dtype=dtype, device=device)
            layers = [_SlotLayer(self.keys[i], self.values[i], self) for i in range(num_layers)]
        self.lengths = [0] * num_slots
        self.staging: _Staging | None = None
        self.as_transformers = Cache(layers=layers)
        self._free = list(range(num_slots))

    @property
    def num_slots(self) -> int:
        """S."""
        return len(self.lengths)

    @property
    def capacity_tokens(self) -> int:
        """C: committed prefix and staged rows of one slot together."""
        return int(self.keys.shape[3]) - self.padding_rows

    @property
    def num_free_slots(self) -> int:
        """How many requests can still be admitted."""
        return len(self._free)

    def allocate(self) -> int:
        """Takes the lowest free slot, empty.

        Raises:
            ValueError: every slot is taken.
        """
        if not self._free:
            raise ValueError(f"all {self.num_slots} cache slots are taken")
        slot = heapq.heappop(self._free)
        self.lengths[slot] = 0
        return slot

    def release(self, slot: int) -> None:
        """Gives a slot back; its rows stay until they are overwritten, invisible to everyone."""
        assert slot not in self._free, "slot released twice"
        self.lengths[slot] = 0
        heapq.heappush(self._free, slot)

    def lengths_with_room(self, slots: Sequence[int], num_rows: int) -> list[int]:
        """The committed length of each slot.

        Raises:
            ValueError: a slot has no room for so many more rows.
        """
        assert len(set(slots)) == len(slots), "a slot appears twice in the batch"
        lengths = [self.lengths[slot] for slot in slots]
        for slot, length in zip(slots, lengths, strict=True):
            if length + num_rows > self.capacity_tokens:
                raise ValueError(
                    f"cache slot {slot} holds {length} of {self.capacity_tokens} tokens: no room for {num_rows} rows"
                )
        return lengths

    def stage_on_device(self, slot_B: Tensor, position_BR: Tensor) -> None:
        """Prepares a forward whose rows go where device tensors say; whoever computed them has checked for room."""
        self.staging = _Staging(slice(None), slot_B[:, None], position_BR, int(self.keys.shape[3]))

    def stage(self, slots: Sequence[int], num_rows: int) -> list[int]:
        """Prepares a forward of ``num_rows`` rows per slot.

        Returns:
            The committed length of each slot.

        Raises:
            ValueError: a slot has no room for the rows.
        """
        lengths = self.lengths_with_room(slots, num_rows)
        device = self.keys.device
        contiguous = list(slots) == list(range(slots[0], slots[0] + len(slots)))
        read = slice(slots[0], slots[0] + len(slots)) if contiguous else on_device(slots, device)
        visible = max(lengths) + num_rows
        if contiguous and len(set(lengths)) == 1:
            self.staging = _Staging(read, read, slice(lengths[0], visible), visible)
        else:
            slot_B, start_B = on_device([list(slots), lengths], device)
            position_BR = start_B[:, None] + torch.arange(num_rows, device=device)
            self.staging = _Staging(read, slot_B[:, None], position_BR, visible)
        return lengths

    def commit(self, slots: Sequence[int] | Tensor, rows_BA: Tensor, counts: Sequence[int] | Tensor) -> None:
        """Keeps an accepted path: moves its rows behind the prefix and lengthens the prefix.

        Args:
            slots: [B] slots of the last forward (host values preferred: a device tensor is waited for).
            rows_BA: int64 [B, A] rows of the path in order, root included; padded with their own column number.
            counts: [B] how many rows of each path to keep, at most A.
        """
        slot_list, count_list = host_list(slots), host_list(counts)
        rows_BA = rows_BA[:, : max(count_list, default=0)].to(self.keys.device)
        if rows_BA.shape[1] > 1:  # the root is always row 0 and stays where it is
            numbers = [slot_list, [self.lengths[slot] for slot in slot_list]]
            slot_B, start_B = on_device(numbers, self.keys.device)
            commit_rows(self.keys, slot_B, start_B, rows_BA)
            commit_rows(self.values, slot_B, start_B, rows_BA)
        self.advance(slot_list, count_list)

    def advance(self, slots: Sequence[int] | Tensor, counts: Sequence[int] | Tensor) -> None:
        """Keeps the first ``counts[b]`` staged rows of each slot as they lie (prefill, plain decoding)."""
        for slot, count in zip(host_list(slots), host_list(counts), strict=True):
            assert 0 <= count <= self.capacity_tokens - self.lengths[slot], "more rows than could have been staged"
            self.lengths[slot] += count

    def truncate(self, slot: int, length: int) -> None:
        """Rolls a slot back to its first ``length`` tokens, exactly.

        Raises:
            ValueError: the slot holds fewer tokens.
        """
        if not 0 <= length <= self.lengths[slot]:
            raise ValueError(f"cache slot {slot} holds {self.lengths[slot]} tokens: cannot roll back to {length}")
        self.lengths[slot] = length


def host_list(values: Sequence[int] | Tensor) -> list[int]:
    """Integers on the host from a sequence or an integer tensor."""
    return values.tolist() if isinstance(values, Tensor) else list(values)

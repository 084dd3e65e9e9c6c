"""The target's forward in fixed shapes: which slots, how many keys and which new rows are seen are data on the device.

The attention reads the whole key/value storage through ``slot_attention``, so nothing about a request's length is in
the shape of a tensor, no mask over the prefix is built, and a forward can be recorded as a CUDA graph.

Legend: B requests, R new rows per request, C capacity of a slot, H hidden size, F fused feature size, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from specblock.cuda_ext.attention import slot_attention
from specblock.cuda_ext.transfer import on_device
from specblock.verifier.graphs import ROW_BUCKETS, ForwardGraphs
from specblock.verifier.kv_cache import TargetCache
from specblock.verifier.loading import SLOT_ATTENTION
from specblock.verifier.native_stack import NativeStack

MOST_ROWS = ROW_BUCKETS[-1]
"""Rows per request up to which a forward goes this way; longer ones are chunks of prompts."""
_ALTERS = ("sliding_window", "softcap", "position_bias", "s_aux")
"""What a model may tell its attention that ``slot_attention`` does not do."""


@dataclass(frozen=True, slots=True)
class SlotRows:
    """The input of one forward.

    Attributes:
        tokens: int64 [B, R].
        depth: int64 [B, R], distance from the end of the prefix.
        visible: bool [B, R, R], which new rows each row sees, itself included.
        numbers: int64 [3, B]: slot, committed length, and the position from which rows are written: the length, but for
            requests that only fill up a batch, whose rows must not touch anyone's prefix.
    """

    tokens: Tensor
    depth: Tensor
    visible: Tensor
    numbers: Tensor

    @property
    def slots(self) -> Tensor:
        """int64 [B]."""
        return self.numbers[0]

    @property
    def lengths(self) -> Tensor:
        """int64 [B]."""
        return self.numbers[1]


Decoder = Callable[..., tuple[Tensor, Tensor]]
"""(tokens, mask, positions, transformers' cache, slot_rows=...) -> hidden [B, R, H], features [B, R, F]."""


class SlotForward:
    """Runs a transformers decoder over slots; as a recorded graph where there is a CUDA device.

    Attributes:
        graphs: whether to record; may be changed at any time.
    """

    def __init__(
        self, decoder: Decoder, head: nn.Module, device: torch.device, graphs: bool, stack: NativeStack | None = None
    ) -> None:
        """Args:
        decoder: runs the decoder layers under ``use_slot_attention``.
        head: output head.
        device: of the model.
        graphs: record forwards, if the device is a CUDA device.
        stack: runs them instead, where there is one.
        """
        self.graphs = graphs and device.type == "cuda"
        self._decoder, self._head, self._device, self._stack = decoder, head, device, stack
        # A 4-D mask passes through transformers as it is: this one stands for "do not build any".
        self._no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        self._recorded: weakref.WeakKeyDictionary[TargetCache, ForwardGraphs] = weakref.WeakKeyDictionary()

    def __call__(
        self, cache: TargetCache, slots: Sequence[int], tokens: Tensor, depth: Tensor, visible: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, R, V] and features [B, R, F] of new rows, which are staged.

        What a graph wrote is overwritten by the next forward over the same cache.

        Args:
            cache: where the prefixes are.
            slots: [B] distinct slots.
            tokens: int64 [B, R].
            depth: int64 [B, R], distance from the end of the prefix.
            visible: bool [B, R, R], which new rows each row sees, itself included.
        """
        lengths = cache.lengths_with_room(slots, tokens.shape[1])
        graphs = self.graphs_over(cache)
        if graphs is not None:
            output = graphs.run(
                lambda rows: self._forward(cache, SlotRows(*rows)), slots, lengths, tokens, depth, visible
            )
            if output is not None:
                return output
        numbers = on_device([slots, lengths, lengths], self._device)
        return self._forward(cache, SlotRows(tokens, depth, visible.contiguous(), numbers))

    @property
    def num_graphs(self) -> int:
        """Graphs over all caches."""
        return sum(len(graphs.sizes) for graphs in self._recorded.values())

    @property
    def num_failures(self) -> int:
        """Recordings that failed, over all caches."""
        return sum(graphs.failures for graphs in self._recorded.values())

    def graphs_over(self, cache: TargetCache) -> ForwardGraphs | None:
        """The graphs over one cache, which go when it goes; None before ``use_graphs``, or if there are to be none."""
        return self._recorded.get(cache) if self.graphs else None

    def use_graphs(self, cache: TargetCache) -> None:
        """From now on forwards over this cache are recorded: it will serve for longer than that takes."""
        if cache not in self._recorded and self._device.type == "cuda":
            self._recorded[cache] = ForwardGraphs(self._device, cache.num_slots, cache.capacity_tokens)

    def _forward(self, cache: TargetCache, rows: SlotRows) -> tuple[Tensor, Tensor]:
        hidden, features = self._decoded(cache, rows) if self._stack is None else self._stack(cache, rows)
        logits: Tensor = self._head(hidden)
        return logits, features

    def _decoded(self, cache: TargetCache, rows: SlotRows) -> tuple[Tensor, Tensor]:
        order_R = torch.arange(rows.tokens.shape[1], device=self._device)
        cache.stage_on_device(rows.slots, rows.numbers[2][:, None] + order_R)
        return self._decoder(
            rows.tokens, self._no_mask, rows.lengths[:, None] + rows.depth, cache.as_transformers, slot_rows=rows
        )


def use_slot_attention(model: Any) -> None:
    """Lets a transformers model take ``slot_rows`` through its forward; without them it attends as SDPA does."""
    AttentionInterface.register(SLOT_ATTENTION, _attention)
    AttentionMaskInterface.register(SLOT_ATTENTION, sdpa_mask)
    model.config._attn_implementation = SLOT_ATTENTION


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    slot_rows: SlotRows | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' calling convention; with ``slot_rows``, keys and values are the whole storage."""
    if slot_rows is None:
        mixed, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
        return mixed, None
    altered = [name for name in _ALTERS if others.get(name) is not None]
    if altered:
        raise ValueError(f"attention with {', '.join(altered)}")
    return slot_attention(query, key, value, slot_rows.slots, slot_rows.lengths, slot_rows.visible, scaling), None

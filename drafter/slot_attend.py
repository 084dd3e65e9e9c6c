"""Attention of a block's rows over the slots of a drafter's cache.

Legend: B requests, T new rows per request, W rows of the cycle so far, of which the new ones are the last.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from specblock.cuda_ext.attention import slot_attention
from specblock.cuda_ext.slot_layer import CacheRows
from specblock.drafter.kv_cache import DrafterCache


class SlotAttend:
    """What ``run_layers`` attends with: writes keys and values of new rows, then looks at prefix and rows.

    A layer whose weights are packed asks for ``rows`` instead, and does all of it in one native call.
    """

    def __init__(
        self,
        cache: DrafterCache,
        slots_B: Tensor,
        first_B: Tensor,
        visible_BTW: Tensor,
        write_B: Tensor | None = None,
        *,
        whole_layers: bool = False,
    ) -> None:
        """Args:
        cache: where the rows go.
        slots_B: int64 [B].
        first_B: int64 [B], rows of each request that all new rows see; W rows of the cycle lie behind them.
        visible_BTW: bool [B, T, W], which of those each new row sees.
        write_B: int64 [B], row from which W rows would be written; None is ``first_B``. Requests that only fill up a
            batch write elsewhere.
        whole_layers: whether layers may ask for ``rows``, which knows of no such requests.
        """
        self._cache, self._slots, self._first, self._visible = cache, slots_B, first_B, visible_BTW
        self._write = first_B if write_B is None else write_B
        self._square: Tensor | None = None  # with where the rows go, made when first needed
        self._places = self._write
        self._whole_layers = whole_layers

    def all_rows(self) -> CacheRows | None:
        """``rows`` of all layers, [layers, ...], for ``LayerStack``."""
        cache = self._cache
        return CacheRows(cache.keys, cache.values, *self._seen) if self._whole_layers else None

    def rows(self, layer: int) -> CacheRows | None:
        """Where the new rows go in one layer, for ``slot_layer``; None where that cannot be."""
        cache = self._cache
        if not self._whole_layers:
            return None
        return CacheRows(cache.keys[layer], cache.values[layer], *self._seen)

    @property
    def _seen(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._slots, self._first, self._visible

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See ``Attend``."""
        cache, (_, count, width) = self._cache, self._visible.shape
        assert query.shape[2] == count, "only whole layers let some rows ask"
        if self._square is None:
            own = torch.arange(width - count, width, device=query.device)
            self._places, self._square = self._write[:, None] + own, self._all_visible()
        cache.put(layer, self._slots, self._places, key, value)
        keys, values = cache.keys[layer], cache.values[layer]
        if width == count:
            return slot_attention(query, keys, values, self._slots, self._first, self._square)
        # Rows of earlier blocks lie before this block's: they ask for nothing, and are there to be seen.
        padded = F.pad(query, (0, 0, width - count, 0))
        mixed = slot_attention(padded, keys, values, self._slots, self._first, self._square)
        return mixed[:, width - count :]

    def _all_visible(self) -> Tensor:
        """bool [B, W, W]: rows of earlier blocks see themselves."""
        batch, count, width = self._visible.shape
        if width == count:
            return self._visible
        itself = torch.eye(width, dtype=torch.bool, device=self._visible.device)[: width - count]
        return torch.cat([itself.expand(batch, -1, -1), self._visible], dim=1)

"""Llama-like decoder layers over the slots of a cache, for the few rows of a cycle: one native call on a CPU.

Legend: L layers, B requests, T new rows per request, A of them that ask for something, W rows behind a prefix of which
the new ones are the last, K size of the residual stream, S slots, G key/value heads, C capacity of a slot, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specblock.cuda_ext.attention import slot_attention_reference
from specblock.cuda_ext.layer import AttentionWeights, RestWeights, attention_inputs_reference, layer_rest_reference
from specblock.cuda_ext.linear import PackedWeight


@dataclass(frozen=True, slots=True)
class CacheRows:
    """Where the new rows of B requests go in one layer of a cache, and what they see there.

    Attributes:
        keys: float32 [S, G, C, D], contiguous in D; written.
        values: as ``keys``.
        slots: int64 [B], distinct.
        lengths: int64 [B], rows of each request's prefix, all of which every new row sees; at most C - W.
        visible: bool [B, T, W], which rows behind the prefix each new row sees; every row sees itself.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    lengths: Tensor
    visible: Tensor


def slot_layer(
    x: Tensor,
    before: AttentionWeights,
    after: RestWeights,
    rotary: tuple[Tensor, Tensor],
    rows: CacheRows,
    *,
    scale: float | None = None,
    residual: Tensor | None = None,
    asking: Tensor | None = None,
) -> Tensor:
    """Keys and values of all new rows go to the cache; the rows that ask attend and go through the SwiGLU.

    A row's result has the same bits whatever other requests, rows and hidden keys there are.

    Args:
        x: float32 [B, T, inputs] on the CPU.
        before: packed products of ``inputs``; without a norm, ``x`` is normalised already.
        after: packed.
        rotary: cos and sin, float32 [B or 1, T, D], half-split layout.
        rows: the cache.
        scale: of the scores; None is D^-0.5.
        residual: float32 [B, T, K]; None is ``x``.
        asking: int64 [B, A], numbers of the rows that ask; None is all T.

    Returns:
        float32 [B, A or T, K].
    """
    b, a, (cos, sin) = before, after, rotary
    stream = None if residual is None else residual.contiguous()
    result: Tensor = torch.ops.specblock.slot_layer.default(
        x.contiguous(), stream, b.norm, b.eps, b.query.panels, b.key.panels, b.value.panels, b.query.out_features,
        b.key.out_features, cos.contiguous(), sin.contiguous(), b.query_norm, b.key_norm, b.head_eps, rows.keys,
        rows.values, rows.slots, rows.lengths, rows.visible, asking, cos.shape[-1] ** -0.5 if scale is None else scale,
        a.output.panels, a.norm, a.eps, a.gate.panels, a.up.panels, a.down.panels, a.gate.out_features, _coarse(b, a),
    )  # fmt: skip
    return result


class LayerStack:
    """The layers of a model, all of one shape, as one native call.

    Args:
        layers: weights before and after the attention of each; norms and packed products everywhere, head norms in all
            layers or in none.
        scale: of the scores; None is D^-0.5.
        shifts: products of 2 K inputs between the layers, or none at all: between two layers a row becomes the product
            of itself and the row before it in the same position, the first of a position of itself twice.
        width: rows per position, where there are shifts.
    """

    def __init__(
        self,
        layers: Sequence[tuple[AttentionWeights, RestWeights]],
        scale: float | None = None,
        shifts: Sequence[PackedWeight] = (),
        width: int = 1,
    ) -> None:
        self._layers, self._scale, self._shifts, self._width = tuple(layers), scale, tuple(shifts), width
        self._shift_panels = [shift.panels for shift in shifts]
        self._weights = [tensor for before, after in layers for tensor in _tensors(before, after)]

    @staticmethod
    def fits(layers: Sequence[tuple[AttentionWeights, RestWeights]]) -> bool:
        """Whether these layers have what a stack needs, and the same of everything that is no tensor."""
        complete = all(before.norm is not None for before, _ in layers)
        return complete and len({_numbers(before, after) for before, after in layers}) == 1

    def __call__(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        rows: CacheRows,
        kept: Sequence[int] = (),
        asking: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``slot_layer`` of one layer after the other, and shifts between them, with the same bits.

        Args:
            x: float32 [B, T, K] on the CPU.
            rotary: cos and sin, float32 [B or 1, T, D].
            rows: the cache; ``keys`` and ``values`` are [L, S, G, C, D].
            kept: layers after which the residual stream is kept; none where only some rows ask.
            asking: int64 [B, A], rows that ask in the last layer; None is all T.

        Returns:
            float32 [B, A or T, K] after the last layer, and [B, T, len(kept) * K].
        """
        (before, after), (cos, sin) = self._layers[0], rotary
        result: tuple[Tensor, Tensor] = torch.ops.specblock.slot_layers.default(
            x.contiguous(), self._weights, before.query_norm is not None, before.eps, before.query.out_features,
            before.key.out_features, cos.contiguous(), sin.contiguous(), before.head_eps, rows.keys, rows.values,
            rows.slots, rows.lengths, rows.visible, cos.shape[-1] ** -0.5 if self._scale is None else self._scale,
            after.eps, after.gate.out_features, _coarse(before, after), kept, self._shift_panels, self._width, asking,
        )  # fmt: skip
        return result

    def reference(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        rows: CacheRows,
        kept: Sequence[int] = (),
        asking: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``__call__`` of its layers."""
        streams: list[Tensor] = []
        for index, (before, after) in enumerate(self._layers):
            own = CacheRows(rows.keys[index], rows.values[index], rows.slots, rows.lengths, rows.visible)
            last = index + 1 == len(self._layers)
            x = slot_layer(x, before, after, rotary, own, scale=self._scale, asking=asking if last else None)
            streams.append(x)
            if self._shifts and not last:
                x_BPKH = x.view(x.shape[0], -1, self._width, x.shape[2])
                left = torch.cat([x_BPKH[:, :, :1], x_BPKH[:, :, :-1]], dim=2)
                x = self._shifts[index](torch.cat([x_BPKH, left], dim=-1)).flatten(1, 2)
        return x, torch.cat([streams[layer] for layer in kept], dim=-1) if kept else x.new_empty(*x.shape[:-1], 0)


def _tensors(before: AttentionWeights, after: RestWeights) -> list[Tensor]:
    """In the order of the native call."""
    products = (before.query, before.key, before.value)
    found = [before.norm, *(w.panels for w in products), before.query_norm, before.key_norm, after.output.panels,
             after.norm, after.gate.panels, after.up.panels, after.down.panels]  # fmt: skip
    return [tensor for tensor in found if tensor is not None]


def _coarse(before: AttentionWeights, after: RestWeights) -> bool:
    """Of all products, which are coarse together or not at all."""
    assert before.query.coarse == before.value.coarse == after.output.coarse == after.down.coarse, "mixed products"
    return after.down.coarse


def _numbers(before: AttentionWeights, after: RestWeights) -> tuple[object, ...]:
    """What all layers of a stack have in common."""
    shapes = tuple(tuple(tensor.shape) for tensor in _tensors(before, after))
    outputs = before.query.out_features, before.key.out_features, after.gate.out_features, _coarse(before, after)
    return shapes, outputs, before.eps, before.head_eps, before.query_norm is None, before.key_norm is None, after.eps


def slot_layer_reference(
    x: Tensor,
    before: AttentionWeights,
    after: RestWeights,
    rotary: tuple[Tensor, Tensor],
    rows: CacheRows,
    *,
    scale: float | None = None,
    residual: Tensor | None = None,
    asking: Tensor | None = None,
) -> Tensor:
    """``slot_layer`` of its parts."""
    batch, count, width = rows.visible.shape
    query, key, value = attention_inputs_reference(x, before, rotary)
    place_BT = rows.lengths[:, None] + width - count + torch.arange(count)
    rows.keys[rows.slots[:, None], :, place_BT] = key.transpose(1, 2)
    rows.values[rows.slots[:, None], :, place_BT] = value.transpose(1, 2)
    # Rows behind the prefix that are not new see themselves only: nobody asks what for.
    old = torch.eye(width, dtype=torch.bool)[: width - count].expand(batch, -1, -1)
    padded = torch.nn.functional.pad(query, (0, 0, width - count, 0))
    mixed = slot_attention_reference(
        padded, rows.keys, rows.values, rows.slots, rows.lengths, torch.cat([old, rows.visible], dim=1),
        query.shape[-1] ** -0.5 if scale is None else scale,
    )[:, width - count :].flatten(2)  # fmt: skip
    stream = x if residual is None else residual
    if asking is not None:
        mixed, stream = (t.gather(1, asking[:, :, None].expand(-1, -1, t.shape[-1])) for t in (mixed, stream))
    return layer_rest_reference(stream, mixed, after)

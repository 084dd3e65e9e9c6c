"""Decoder layers as few native calls: what they are made of, gathered once; where that cannot be, their parts.

Legend: B batch, T rows, A rows that look for something, I inputs, H hidden, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from specblock.cuda_ext.layer import AttentionWeights, RestWeights, layer_rest
from specblock.cuda_ext.norm import add_rms_norm
from specblock.cuda_ext.slot_layer import slot_layer
from specblock.drafter.layers import MLP, Attend, Attention, Linear, RMSNorm
from specblock.drafter.slot_attend import SlotAttend

T = TypeVar("T")


class Gathered(Generic[T]):
    """What native calls want of some linear maps: gathered once, and again when a weight changes."""

    def __init__(self, linears: Sequence[Linear], gather: Callable[[], T]) -> None:
        """Args:
        linears: the maps, all of them packed wherever this is called.
        gather: reads their packed weights.
        """
        self._linears, self._gather = tuple(linears), gather
        self._state: tuple[object, ...] = ()
        self._found: T | None = None

    def __call__(self) -> T:
        """What was gathered, from the weights as they are."""
        state = tuple(linear.state for linear in self._linears)
        if self._found is None or state != self._state:
            self._found, self._state = self._gather(), state
        return self._found


class DecoderBlock:
    """What a decoder layer is made of, as one native call wants it."""

    def __init__(self, before: RMSNorm | None, attention: Attention, after: RMSNorm, mlp: MLP) -> None:
        """Args:
        before: norm of what attention is given; None: rows come normalised.
        attention: looks at other rows.
        after: norm of what the MLP is given.
        mlp: the rest.
        """
        self._before, self._attention, self._after, self._mlp = before, attention, after, mlp
        self.linears = (
            attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj,
            mlp.down_proj,
        )  # fmt: skip
        self._gathered = Gathered(self.linears, self.gather)

    def weights(self) -> tuple[AttentionWeights, RestWeights]:
        """Packed; all of it must be."""
        return self._gathered()

    def gather(self) -> tuple[AttentionWeights, RestWeights]:
        """``weights``, read anew."""
        before = self._attention.weights(self._before)
        after = rest_weights(self._attention.o_proj, self._after, self._mlp)
        assert before is not None and after is not None, "whole layers are asked for where all weights are packed"
        return before, after


def whole_layer(
    x_BTI: Tensor,
    layer: int,
    rotary: tuple[Tensor, Tensor],
    attend: Attend,
    asking: Tensor | None,
    block: DecoderBlock,
    residual: Tensor | None = None,
) -> Tensor | None:
    """A decoder layer in one native call, [B, T or A, H]; None where that cannot be.

    Args:
        x_BTI: rows, to be normalised by the block's first norm if it has one.
        layer: its number in the cache.
        rotary, attend, asking: as of a layer's ``forward``.
        block: what the layer is made of.
        residual: [B, T, H], what the layer adds to; None is ``x_BTI``.
    """
    rows = attend.rows(layer) if isinstance(attend, SlotAttend) else None
    if rows is None:
        return None
    before, after = block.weights()
    tables = rotary[0][:, 0], rotary[1][:, 0]
    return slot_layer(x_BTI, before, after, tables, rows, residual=residual, asking=asking)


def rest_weights(output: Linear, norm: RMSNorm, mlp: MLP) -> RestWeights | None:
    """What a decoder layer does after its attention, for native calls; None where something is not packed."""
    packed = [p.packed_weight() for p in (output, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    whole = [weight for weight in packed if weight is not None]
    if len(whole) < len(packed):
        return None
    names = dict(zip(("output", "gate", "up", "down"), whole, strict=True))
    return RestWeights(norm=norm.weight, eps=norm.eps, **names)


def rest_of_layer(x_BTH: Tensor, mixed: Tensor, output: Linear, norm: RMSNorm, mlp: MLP) -> Tensor:
    """What a decoder layer does after its attention: [B, A, H] from its rows and ``mixed`` [B, A, heads * D]."""
    weights = rest_weights(output, norm, mlp)
    if weights is not None:
        return layer_rest(x_BTH, mixed, weights)
    x_BTH, normed = add_rms_norm(output(mixed), x_BTH, norm.weight, norm.eps)
    result: Tensor = x_BTH + mlp(normed)
    return result

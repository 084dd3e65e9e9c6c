"""The two halves of a Llama-like decoder layer around its attention, for the few rows of a cycle.

Legend: B requests, T rows, K hidden size, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specblock.cuda_ext.linear import PackedWeight, swiglu
from specblock.cuda_ext.norm import rms_norm


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    """What comes before attention: a norm [K] and its eps, three products, norms [D] of query and key heads or None.

    Without the first norm, rows are normalised already. The products are coarse all together or not at all.
    """

    norm: Tensor | None
    eps: float
    query: PackedWeight
    key: PackedWeight
    value: PackedWeight
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    head_eps: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RestWeights:
    """What comes after: the output product, the second norm [K] and its eps, the SwiGLU; products as before."""

    output: PackedWeight
    norm: Tensor
    eps: float
    gate: PackedWeight
    up: PackedWeight
    down: PackedWeight


def attention_inputs(
    x: Tensor, weights: AttentionWeights, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries, rotated keys, and values of normalised rows; one native call.

    Args:
        x: float32 [B, T, K] on the CPU.
        weights: packed, with a norm.
        rotary: cos and sin, float32 [B or 1, T, D], half-split layout.

    Returns:
        float32 [B, heads, T, D], [B, key heads, T, D] twice; transposed views.
    """
    w, (cos, sin) = weights, rotary
    query, key, value = torch.ops.specblock.attention_inputs(
        x.contiguous(), w.norm, w.eps, w.query.panels, w.key.panels, w.value.panels, w.query.out_features,
        w.key.out_features, cos.contiguous(), sin.contiguous(), w.query_norm, w.key_norm, w.head_eps, w.query.coarse,
    )  # fmt: skip
    size = cos.shape[-1]
    return _heads(query, size), _heads(key, size), _heads(value, size)


def attention_inputs_reference(
    x: Tensor, weights: AttentionWeights, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """``attention_inputs`` of its parts."""
    w = weights
    normed = x if w.norm is None else rms_norm(x, w.norm, w.eps)
    query = w.query.heads(normed, rotary, w.query_norm, w.head_eps)
    key = w.key.heads(normed, rotary, w.key_norm, w.head_eps)
    return query, key, _heads(w.value(normed), rotary[0].shape[-1])


def layer_rest(x: Tensor, mixed: Tensor, weights: RestWeights) -> Tensor:
    """``r + swiglu(norm(r))`` with ``r = x + output(mixed)``; one native call.

    Args:
        x: float32 [..., K] on the CPU, what the layer was given.
        mixed: float32 [..., heads * D], what its attention gave.
        weights: packed.
    """
    w = weights
    result: Tensor = torch.ops.specblock.layer_rest(
        x.contiguous(), mixed.contiguous(), w.output.panels, w.norm, w.eps, w.gate.panels, w.up.panels, w.down.panels,
        w.gate.out_features, w.gate.coarse,
    )  # fmt: skip
    return result


def layer_rest_reference(x: Tensor, mixed: Tensor, weights: RestWeights) -> Tensor:
    """``layer_rest`` of its parts."""
    w = weights
    residual = x + w.output(mixed)
    return residual + swiglu(rms_norm(residual, w.norm, w.eps), w.gate, w.up, w.down)


def _heads(flat: Tensor, size: int) -> Tensor:
    return flat.view(*flat.shape[:2], -1, size).transpose(1, 2)

"""What a decoder layer does between its products, in one operation each; native on CUDA devices.

Legend: B requests, R new rows, H heads, G key/value heads, D head size, C capacity, K inner size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from specblock.cuda_ext.native import serves_cuda
from specblock.cuda_ext.norm import rms_norm, whole_vectors

_CUDA_HEAD_SIZES = (32, 64, 128, 256)


def rotary_store(
    qkv: Tensor,
    rotary: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
) -> Tensor:
    """Rotates queries and keys, and writes keys and values into the cache as it lies.

    Slots and positions stay on the device, unread: a CUDA kernel does not write what is out of range.

    Args:
        qkv: [B, R, (H + 2 G) D], queries, keys and values of the new rows.
        rotary: cos and sin [B, R, D] in the type of ``qkv``, half-split layout.
        norms: weights [D] of root-mean-square norms over each head of queries and of keys, applied first, or None.
        eps: of the norms.
        keys: [slots, G, C, D], one layer of the cache, written in place.
        values: as ``keys``.
        slots: int64 [B], distinct.
        positions: int64 [B, R], where in the slot each row goes.

    Returns:
        Rotated queries [B, R, H, D].
    """
    cos, sin = rotary
    if _rotary_is_native(qkv, cos, sin, norms, keys, values, slots, positions):
        q_norm, k_norm = norms or (None, None)
        result: Tensor = torch.ops.specblock.rotary_store(
            qkv, cos.contiguous(), sin.contiguous(), q_norm, k_norm, eps, keys, values, slots.contiguous(),
            positions.contiguous(),
        )  # fmt: skip
        return result
    query, key, value = rotated_heads(qkv, rotary, norms, eps, keys.shape[1])
    # Index tensors around a slice put the indexed axes first, hence heads last but one.
    keys[slots[:, None], :, positions] = key
    values[slots[:, None], :, positions] = value
    return query


def rotated_heads(
    qkv: Tensor, rotary: tuple[Tensor, Tensor], norms: tuple[Tensor, Tensor] | None, eps: float, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries [B, R, H, D], rotated keys [B, R, G, D] and values; the reference of ``rotary_store``."""
    cos, sin = (table[:, :, None] for table in rotary)
    heads = qkv.view(*qkv.shape[:-1], -1, cos.shape[-1])
    query, key, value = torch.split(heads, [heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads], dim=2)
    if norms is not None:
        query, key = rms_norm(query, norms[0], eps), rms_norm(key, norms[1], eps)
    return _rotated(query, cos, sin), _rotated(key, cos, sin), value


def gated(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of [..., 2 K], which has both: [..., K]."""
    inner = gate_up.shape[-1] // 2
    aligned = inner * gate_up.element_size() % 16 == 0 and gate_up.is_contiguous()
    if serves_cuda("gated", gate_up) and aligned and whole_vectors(gate_up):
        result: Tensor = torch.ops.specblock.gated(gate_up.flatten(0, -2))
        return result.view(*gate_up.shape[:-1], inner)
    return gated_reference(gate_up)


def gated_reference(gate_up: Tensor) -> Tensor:
    """``gated`` on every device, in every type."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def _rotary_is_native(
    qkv: Tensor, cos: Tensor, sin: Tensor, norms: tuple[Tensor, Tensor] | None, *cache_and_places: Tensor
) -> bool:
    weights, (keys, values) = norms or (), cache_and_places[:2]
    return (
        serves_cuda("rotary_store", qkv, cos, sin, *weights, *cache_and_places)
        and cos.shape[-1] in _CUDA_HEAD_SIZES
        and cos.shape[:2] == qkv.shape[:2]
        and qkv.is_contiguous()
        and keys.stride(-1) == values.stride(-1) == 1
        and whole_vectors(qkv, cos.contiguous(), sin.contiguous(), keys, values, *weights)
    )

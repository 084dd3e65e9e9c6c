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


def rotary_heads(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Heads rotated in float32: [B, R, H * D] and cos and sin, float32 [B, R, D], give [B, R, H, D]."""
    cos, sin = (table.contiguous() for table in rotary)
    fits = cos.shape[-1] in _CUDA_HEAD_SIZES and cos.shape[:2] == x.shape[:2] and cos.dtype == torch.float32
    if fits and serves_cuda("rotary_heads", x, cos, sin) and x.is_contiguous() and whole_vectors(x):
        result: Tensor = torch.ops.specblock.rotary_heads(x, cos, sin)
        return result
    return rotary_heads_reference(x, rotary)


def rotary_heads_reference(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """``rotary_heads`` on every device, in every type; differentiable."""
    cos, sin = (table[:, :, None] for table in rotary)
    heads = x.view(*x.shape[:-1], -1, cos.shape[-1])
    return _rotated(heads.to(torch.promote_types(x.dtype, torch.float32)), cos, sin).to(x.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` of [..., K], which may be columns of one product."""
    flat = [x.flatten(0, -2) for x in (gate, up)] if gate.dim() > 1 else [gate[None], up[None]]
    aligned = all(x.stride(-1) == 1 and x.stride(0) * x.element_size() % 16 == 0 for x in flat)
    if aligned and serves_cuda("gated", gate, up) and whole_vectors(*flat):
        result: Tensor = torch.ops.specblock.gated(*flat)
        return result.view(gate.shape)
    return gated_reference(gate, up)


def gated_reference(gate: Tensor, up: Tensor) -> Tensor:
    """``gated`` on every device, in every type; differentiable."""
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

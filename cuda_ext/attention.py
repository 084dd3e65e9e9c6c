"""Attention of draft-tree rows: grouped queries over a prefix and the rows of the tree itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from specblock.cuda_ext.native import serves, serves_cuda

_NATIVE_ROWS = 256  # the largest tree; longer chunks of a prompt are quicker in PyTorch's kernel, built for squares
_CUDA_HEAD_SIZES = (64, 128)
_CUDA_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def tree_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention with an explicit mask; the keys of a group are read once for all its heads and rows.

    The native operation gives a row the same bits whatever other rows and hidden keys there are.

    Args:
        query: [B, heads, R, D].
        key: [B, kv_heads, T, D]; finite even where it is hidden.
        value: [B, kv_heads, T, D]; finite even where it is hidden.
        mask: bool [B, R, T], what each row sees; at least one key per row.
        scale: of the scores; None is D^-0.5.

    Returns:
        [B, R, heads, D].
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    aligned = query.shape[-1] % 16 == 0 and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    if aligned and query.shape[2] <= _NATIVE_ROWS and serves(query, key, value):
        result: Tensor = torch.ops.specblock.tree_attention(query, key, value, mask, scale)
        return result
    return masked_attention(query, key, value, mask, scale)


def slot_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    lengths: Tensor,
    visible: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Attention of new rows over the cache as it lies: the committed prefix of each request's slot, then the rows.

    Nothing is gathered and no mask over the prefix is made. The host waits for nothing, and what is launched depends on
    shapes alone, so a graph can capture it. In float32 the native operations give a row the same bits whatever other
    requests, rows and hidden keys there are, on CUDA for one capacity of the cache. In bfloat16 and float16 its
    rounding depends on how many requests and rows share the device.

    Args:
        query: [B, heads, R, D], contiguous in D.
        key: one layer of the cache, [slots, kv_heads, capacity, D], contiguous in D. The keys of the new rows are
            already at positions ``lengths[b] .. lengths[b] + R - 1``, finite; what lies behind them is never used.
        value: as ``key``.
        slots: int64 [B], where each request's keys are.
        lengths: int64 [B], committed tokens of each request, all of which every row sees; at most capacity - R.
        visible: bool [B, R, R], contiguous, which new rows each row sees; every row sees itself.
        scale: of the scores, positive; None is D^-0.5.

    Returns:
        [B, R, heads, D], contiguous.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if _slots_are_native(query, key, value, slots, lengths, visible):
        result: Tensor = torch.ops.specblock.slot_attention(query, key, value, slots, lengths, visible, scale)
        return result
    return slot_attention_reference(query, key, value, slots, lengths, visible, scale)


def _slots_are_native(query: Tensor, key: Tensor, value: Tensor, *others: Tensor) -> bool:
    size = query.shape[-1]
    if not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1:
        return False
    if query.is_cuda:
        alike = query.dtype == key.dtype == value.dtype
        fits = size in _CUDA_HEAD_SIZES and query.dtype in _CUDA_TYPES and alike
        return fits and serves_cuda("slot_attention", query, key, value, *others)
    return size % 16 == 0 and query.shape[2] <= _NATIVE_ROWS and serves(query, key, value)


def slot_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, slots: Tensor, lengths: Tensor, visible: Tensor, scale: float
) -> Tensor:
    """The readable definition of ``slot_attention``, for every device and type: whole slots under an explicit mask."""
    batch, rows, capacity = query.shape[0], query.shape[2], key.shape[2]
    place_BC = torch.arange(capacity, device=key.device) - lengths[:, None]  # 0 is the first new row
    # A hidden key counts as zero times its value, which is no zero where storage was never written.
    held_B1C1 = (place_BC < rows)[:, None, :, None]
    keys, values = key[slots].where(held_B1C1, 0), value[slots].where(held_B1C1, 0)
    row_BRC = place_BC.clamp(0, rows - 1)[:, None].expand(batch, rows, capacity)
    new_BRC = visible.gather(2, row_BRC) & (place_BC < rows)[:, None]
    mask = (place_BC < 0)[:, None] | new_BRC
    return masked_attention(query, keys, values, mask, scale).contiguous()


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The reference, for every device and type; groups become extra query rows instead of repeated keys."""
    batch, heads, rows, dim = query.shape
    groups = heads // key.shape[1]
    packed = query.reshape(batch, key.shape[1], groups * rows, dim)
    wide_mask = mask[:, None].expand(-1, groups, -1, -1).reshape(batch, 1, groups * rows, -1)
    mixed = F.scaled_dot_product_attention(packed, key, value, attn_mask=wide_mask, scale=scale)
    return mixed.reshape(batch, heads, rows, dim).transpose(1, 2)

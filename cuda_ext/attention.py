"""Attention of draft-tree rows: grouped queries over a prefix and the rows of the tree itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from specblock.cuda_ext.native import serves

_NATIVE_ROWS = 256  # the largest tree; longer chunks of a prompt are quicker in PyTorch's kernel, built for squares


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


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The reference, for every device and type; groups become extra query rows instead of repeated keys."""
    batch, heads, rows, dim = query.shape
    groups = heads // key.shape[1]
    packed = query.reshape(batch, key.shape[1], groups * rows, dim)
    wide_mask = mask[:, None].expand(-1, groups, -1, -1).reshape(batch, 1, groups * rows, -1)
    mixed = F.scaled_dot_product_attention(packed, key, value, attn_mask=wide_mask, scale=scale)
    return mixed.view(batch, heads, rows, dim).transpose(1, 2)

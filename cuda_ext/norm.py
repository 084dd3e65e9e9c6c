"""Root-mean-square norm over the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from specblock.cuda_ext.native import serves


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalises rows of ``x`` [..., K] and multiplies with ``weight`` [K]; computed in float32 at least.

    The native operation gives a row the same bits whatever other rows there are.
    """
    if serves(x, weight):
        result: Tensor = torch.ops.specblock.rms_norm(x.contiguous(), weight, eps)
        return result
    return reference_norm(x, weight, eps)


def reference_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The reference, for every device and type."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * weight).to(x.dtype)

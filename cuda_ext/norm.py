"""Root-mean-square norm over the last dimension, alone or behind the addition of a residual."""

from __future__ import annotations

import torch
from torch import Tensor

from specblock.cuda_ext.native import serves, serves_cuda

CUDA_TYPES = (torch.bfloat16, torch.float16, torch.float32)
_CUDA_NORM_BYTES = 16 * 4096  # of a row: what one block keeps in its registers


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalises rows of ``x`` [..., K] and multiplies with ``weight`` [K].

    Statistics are float32 at least; the normalised row is rounded to the type of ``x`` before the product, as
    transformers does. The native operations give a row the same bits whatever other rows there are.
    """
    on_cuda = serves_cuda("rms_norm", x, weight)
    if on_cuda or serves(x, weight):
        x = x.contiguous()
        if not on_cuda or _fits_cuda(x, weight):
            result: Tensor = torch.ops.specblock.rms_norm(x, weight, eps)
            return result
    return reference_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + residual`` and its norm, all [..., K]; see ``rms_norm``."""
    if serves_cuda("add_rms_norm", x, weight, residual):
        x, residual = x.contiguous(), residual.contiguous()
        if _fits_cuda(x, weight, residual):
            found: tuple[Tensor, Tensor] = torch.ops.specblock.add_rms_norm(x, residual, weight, eps)
            return found
    total = x + residual
    return total, rms_norm(total, weight, eps)


def reference_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The reference, for every device and type."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide.to(x.dtype) * weight).to(x.dtype)


def whole_vectors(*tensors: Tensor) -> bool:
    """Whether CUDA kernels can take the rows of these as they are, in vectors of 16 bytes: one type, aligned."""
    first = tensors[0]
    return first.dtype in CUDA_TYPES and all(
        t.dtype == first.dtype and t.shape[-1] * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in tensors
    )


def _fits_cuda(x: Tensor, weight: Tensor, *others: Tensor) -> bool:
    row_bytes = x.shape[-1] * x.element_size()
    return weight.is_contiguous() and 0 < row_bytes <= _CUDA_NORM_BYTES and whole_vectors(x, weight, *others)

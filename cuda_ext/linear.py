"""Linear maps for few rows on a CPU: weights packed in panels, in half the bytes where nothing is lost by it.

A decode cycle multiplies one to some dozen rows with every weight: it waits for memory, and general matrix products are
built for many rows. The native product reads each weight once, in bfloat16 where the float32 value is a bfloat16 number
(most published checkpoints), which is exact; a row's result has the same bits alone and among others.

Legend: N outputs, K inputs, M rows, J = ceil(N / 16) panels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from specblock.cuda_ext.native import native_available

PANEL = 16


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight matrix in the layout of the native product.

    Attributes:
        panels: [J, K, 16] bfloat16 or float32; the last panel is filled with zeros. In bfloat16 the columns of a row
            are in the order 0, 8, 1, 9, ..., 7, 15: one word then holds columns j and j + 8.
        out_features: N.
        coarse: round rows to bfloat16 before they are multiplied, where that is faster; see ``rounds_rows``.
    """

    panels: Tensor
    out_features: int
    coarse: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [..., K] -> float32 [..., N]."""
        result: Tensor = torch.ops.specblock.packed_linear(x.contiguous(), self.panels, self.out_features, self.coarse)
        return result

    def heads(self, x: Tensor, rotary: tuple[Tensor, Tensor], norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
        """The product as attention heads, normalised and rotated.

        Args:
            x: float32 [B, T, K].
            rotary: cos and sin, float32 [B, T, D] (or broadcastable to it), half-split layout.
            norm: float32 [D], weight of a root-mean-square norm over each head, applied first.
            eps: of the norm.

        Returns:
            float32 [B, N / D, T, D], a transposed view.
        """
        batch, rows, _ = x.shape
        cos, sin = (table.expand(batch, rows, -1).reshape(batch * rows, -1).contiguous() for table in rotary)
        flat: Tensor = torch.ops.specblock.rotary_linear(
            x.contiguous(), self.panels, self.out_features, cos, sin, norm, eps, self.coarse
        )
        return flat.view(batch, rows, -1, cos.shape[-1]).transpose(1, 2)

    def unpacked(self) -> Tensor:
        """The matrix [N, K] in float32."""
        count, inputs, _ = self.panels.shape
        rows = self.panels.transpose(1, 2)
        if rows.dtype == torch.bfloat16:
            rows = rows.reshape(count, PANEL // 2, 2, inputs).transpose(1, 2)
        return rows.reshape(count * PANEL, inputs)[: self.out_features].float()


def swiglu(x: Tensor, gate: PackedWeight, up: PackedWeight, down: PackedWeight) -> Tensor:
    """``down(silu(gate(x)) * up(x))``: float32 [..., K] -> float32 [..., N]."""
    result: Tensor = torch.ops.specblock.swiglu(
        x.contiguous(), gate.panels, up.panels, down.panels, gate.out_features, down.out_features, gate.coarse
    )
    return result


@torch.no_grad()
def round_weights(model: nn.Module) -> None:
    """Makes every weight a bfloat16 number, in its own type; buffers stay as they are."""
    for weight in model.parameters():
        weight.copy_(weight.to(torch.bfloat16))


def can_pack(weight: Tensor) -> bool:
    """Whether the native product serves this weight: float32 on a CPU, and the library is there."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and native_available()


@functools.cache
def rounds_rows() -> bool:
    """Whether this processor multiplies bfloat16 numbers, so that coarse products are products of rounded rows."""
    if not native_available():
        return False
    one, between = pack(torch.ones(1, 1)), torch.tensor([[1 + 2.0**-12]])  # two neighbours in bfloat16 are 2^-7 apart
    return not torch.equal(one(between), replace(one, coarse=True)(between))


def pack(weight: Tensor, coarse: bool = False) -> PackedWeight:
    """Packs ``weight`` float32 [N, K]; stored as bfloat16 if every value is one."""
    outputs, inputs = weight.shape
    padded = nn.functional.pad(weight.detach(), (0, 0, 0, -outputs % PANEL))
    half = padded.to(torch.bfloat16)
    # An infinite weight times the zero parts of a value would be no number.
    exact = torch.equal(half.float(), padded) and bool(padded.isfinite().all())
    rows = (half if exact else padded).view(-1, PANEL, inputs)
    if exact:
        rows = rows.view(-1, 2, PANEL // 2, inputs).transpose(1, 2).reshape(-1, PANEL, inputs)
    return PackedWeight(rows.transpose(1, 2).contiguous(), outputs, coarse)


class PackedLinear(nn.Module):
    """Takes the place of an ``nn.Linear`` whose weight will not change."""

    def __init__(self, linear: nn.Linear, coarse: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = pack(linear.weight, coarse)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        result = self.packed(x)
        return result if self.bias is None else result + self.bias


def pack_linears(model: nn.Module, coarse: bool = False) -> int:
    """Replaces every ``nn.Linear`` below ``model`` that ``can_pack`` accepts; returns how many."""

    def packed(child: nn.Module) -> nn.Module | None:
        return PackedLinear(child, coarse) if type(child) is nn.Linear and can_pack(child.weight) else None

    return exchange(model, packed)


def exchange(model: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> int:
    """Puts ``replacement(child)`` in the place of every module below ``model`` that has one; returns how many."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            new = replacement(child)
            if new is not None:
                setattr(parent, name, new)
                count += 1
    return count

"""Cos and sin of rotary positions, looked up in the few rows of every cycle instead of computed anew; on CPUs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


class RotaryTables:
    """Tables that grow with the caches they serve.

    Args:
        compute: int64 [1, P], ascending positions from 0 on -> cos and sin float32 [..., P, D], without other sizes
            than 1 before P.
    """

    def __init__(self, compute: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self._compute = compute
        self._cos = self._sin = torch.empty(0, 0)

    def of(self, position: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Cos and sin float32 [..., D] of positions int64 [...], all of them below ``most``."""
        if self._cos.shape[0] < most:
            with torch.inference_mode(False), torch.no_grad():
                cos, sin = self._compute(torch.arange(most)[None])
                self._cos, self._sin = cos.flatten(0, -2), sin.flatten(0, -2)
        return functional.embedding(position, self._cos), functional.embedding(position, self._sin)

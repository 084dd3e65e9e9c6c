"""Muon: momentum whose update is orthogonalised, for hidden matrices.

The update rule is that of ``torch.optim.Muon``, which computes the orthogonalisation in bfloat16 everywhere. On CPUs
that are slow in bfloat16 this took most of a training step (some 15 of 18 s for the demo drafter), so here the number
format is the one the device is fast in.

Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); Newton-Schulz coefficients from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from specblock.drafter.precision import fast_bfloat16

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_EPS = 1e-7
_MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled by ``sqrt(max(1, rows / columns))``.

    Args:
        params: matrices.
        lr: step size.
        weight_decay: decoupled decay.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon moves matrices only, got a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        assert closure is None, "gradients are computed by the caller"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                momentum: Tensor = state["momentum_buffer"]
                momentum.lerp_(parameter.grad, 1 - _MOMENTUM)
                update = orthogonalise(parameter.grad.lerp(momentum, _MOMENTUM))
                rows, columns = parameter.shape
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))


def orthogonalise(matrix: Tensor) -> Tensor:
    """A matrix with the same singular vectors and singular values near 1, by five Newton-Schulz steps.

    Args:
        matrix: [m, n].

    Returns:
        [m, n], bfloat16 where the device is fast in it, else float32.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.to(torch.bfloat16 if fast_bfloat16(matrix.device) else torch.float32)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x

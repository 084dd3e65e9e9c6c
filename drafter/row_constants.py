"""What about a cycle's rows is the same in every cycle: masks and offsets. Made once on CPUs; read only.

On CUDA devices they are made anew: what a recording makes is the recording's.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_FEW_ROWS = 64  # of a cycle; a prompt's are too many, and of too many numbers, to be kept


def causal(batch: int, count: int, device: torch.device) -> Tensor:
    """bool [B, T, T]: every row sees itself and those before it."""
    if device.type != "cpu" or count > _FEW_ROWS:
        return _causal(batch, count, device)
    return _few_causal(batch, count)


def row_offsets(count: int, width: int, device: torch.device) -> Tensor:
    """int64 [P * K]: ``DraftNetwork.rotary_index`` of P consecutive positions from 0 on."""
    if device.type != "cpu" or count * width > _FEW_ROWS:
        return _row_offsets(count, width, device)
    return _few_offsets(count, width)


@functools.lru_cache(maxsize=256)
def _few_causal(batch: int, count: int) -> Tensor:
    with torch.inference_mode(False):
        return _causal(batch, count, torch.device("cpu"))


@functools.lru_cache(maxsize=64)
def _few_offsets(count: int, width: int) -> Tensor:
    with torch.inference_mode(False):
        return _row_offsets(count, width, torch.device("cpu"))


def _causal(batch: int, count: int, device: torch.device) -> Tensor:
    order = torch.arange(count, device=device)
    return (order <= order[:, None]).expand(batch, -1, -1).contiguous()


def _row_offsets(count: int, width: int, device: torch.device) -> Tensor:
    return (torch.arange(count, device=device)[:, None] + torch.arange(1, width + 1, device=device)).flatten()

"""Number formats: what a name of one means on a device, and which is fast there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch.nn import functional as F

from specblock.cuda_ext.linear import pack, rounds_rows
from specblock.cuda_ext.native import native_available

_OUTPUTS, _INPUTS = 1408, 512
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """How models compute.

    Attributes:
        dtype: of tensors.
        coarse: weights are bfloat16 numbers and rows are rounded to such before they are multiplied; sums and all
            else are ``dtype``.
    """

    dtype: torch.dtype
    coarse: bool = False


def number_format(name: str, device: torch.device | str) -> NumberFormat:
    """What "float32", "bfloat16" or "float64" means on a device.

    On a CPU that multiplies bfloat16 numbers, "bfloat16" is native products with float32 sums; on other CPUs it is
    PyTorch's.
    """
    if name == "bfloat16" and torch.device(device).type == "cpu" and rounds_rows():
        return NumberFormat(torch.float32, coarse=True)
    return NumberFormat(_DTYPES[name])


@cache
def fast_bfloat16(device: torch.device) -> bool:
    """Whether large bfloat16 matrix products beat float32; on CPUs this is measured once, in some 50 ms.

    The instruction set does not tell: of two CPUs without AMX, one ran bfloat16 at twice the speed of float32 and the
    other at half.
    """
    if device.type != "cpu":
        return True
    rows, weight = torch.ones(512, _INPUTS), torch.ones(_OUTPUTS, _INPUTS)
    half_rows, half_weight = rows.bfloat16(), weight.bfloat16()
    return shortest_s(lambda: F.linear(half_rows, half_weight)) < shortest_s(lambda: F.linear(rows, weight))


@cache
def serves_faster_in_bfloat16(device: torch.device) -> bool:
    """Whether decode cycles, a few rows at a time, are faster in bfloat16 than in float32.

    On CPUs with native operations their product of 16 float32 rows is held against one of bfloat16, once: the native,
    where there is one, or PyTorch's; with a weight of bfloat16 numbers, as most published checkpoints have.
    """
    if device.type != "cpu" or not native_available():
        return fast_bfloat16(device)
    rows, weight = torch.ones(16, _INPUTS), torch.ones(_OUTPUTS, _INPUTS)
    packed = pack(weight)
    exact_s = shortest_s(lambda: packed(rows))
    if rounds_rows():
        coarse = replace(packed, coarse=True)
        return shortest_s(lambda: coarse(rows)) < exact_s
    half_rows, half_weight = rows.bfloat16(), weight.bfloat16()
    return shortest_s(lambda: F.linear(half_rows, half_weight)) < exact_s


def shortest_s(action: Callable[[], object]) -> float:
    """Shortest of several tries, on one thread: threads that wait for a busy core would be what is measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for _ in range(8):
            begin = time.perf_counter()
            action()
            times.append(time.perf_counter() - begin)
        return min(times)
    finally:
        torch.set_num_threads(threads)

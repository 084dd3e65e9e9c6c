"""Which number format a device is fast in."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch.nn import functional as F

from specblock.cuda_ext.linear import pack
from specblock.cuda_ext.native import native_available

_OUTPUTS, _INPUTS = 1408, 512


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

    On CPUs native operations serve float32: if they are there, their product of 16 rows is held against PyTorch's in
    bfloat16, once; with a weight of bfloat16 numbers, as most published checkpoints have.
    """
    if device.type != "cpu" or not native_available():
        return fast_bfloat16(device)
    rows, weight = torch.ones(16, _INPUTS), torch.ones(_OUTPUTS, _INPUTS)
    half_rows, half_weight, packed = rows.bfloat16(), weight.bfloat16(), pack(weight)
    return shortest_s(lambda: F.linear(half_rows, half_weight)) < shortest_s(lambda: packed(rows))


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

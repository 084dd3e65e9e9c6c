"""Which number format a device is fast in."""

from __future__ import annotations

import time
from functools import cache

import torch


@cache
def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products beat float32; on CPUs this is measured once, in some 50 ms.

    The instruction set does not tell: of two CPUs without AMX, one ran bfloat16 at twice the speed of float32 and the
    other at half.
    """
    if device.type != "cpu":
        return True
    # On one thread: threads that wait for a busy core would be what is measured.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _product_s(torch.bfloat16) < _product_s(torch.float32)
    finally:
        torch.set_num_threads(threads)


def _product_s(dtype: torch.dtype) -> float:
    rows, weight = torch.ones(512, 512, dtype=dtype), torch.ones(1408, 512, dtype=dtype)
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        torch.nn.functional.linear(rows, weight)
        times.append(time.perf_counter() - begin)
    return min(times)

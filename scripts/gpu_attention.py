#!/usr/bin/env python3
"""Times of slot attention beside PyTorch's attention with a mask, and the time that reading the keys alone takes.

Both sides are timed as the engine would run them at best: captured in a graph, keys and values not in the cache of the
device. PyTorch is spared the gathering of the slots and the building of the mask.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpu_common import Row, device_is_missing, import_from_checkout, middle

if TYPE_CHECKING:
    from torch import Tensor

HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
SIZES = [(batch, rows, prefix) for prefix in (512, 4096, 16384) for batch in (1, 4, 16) for rows in (1, 8, 16, 32, 64)]
CPU_SIZES = [(1, 1, 512), (4, 8, 512)]
ROTATED_BYTES = 256 << 20  # several times the cache of the device
REPEATS = 15


@dataclass(frozen=True, slots=True)
class Size:
    """What is timed: ``sets`` disjoint sets of ``batch`` slots, used in turn."""

    batch: int
    rows: int
    prefix: int
    element_bytes: int

    @property
    def keys(self) -> int:
        """Keys that a row's request has."""
        return self.prefix + self.rows

    @property
    def capacity(self) -> int:
        """Tokens of a slot."""
        return -(-self.keys // 64) * 64

    @property
    def moved_bytes(self) -> int:
        """The least that must be read and written."""
        cached = 2 * self.batch * KV_HEADS * self.keys
        return (cached + 2 * self.batch * self.rows * HEADS) * HEAD_SIZE * self.element_bytes

    @property
    def sets(self) -> int:
        """How many make the device read memory every time."""
        return max(2, min(64, -(-ROTATED_BYTES // self.moved_bytes)))


def timed(calls: list[Callable[[], Any]], device: str) -> tuple[float, float]:
    """Median and interquartile range of one call, in ms; the calls are made in turn."""
    import torch

    times = []
    if device == "cpu":
        for _ in range(REPEATS):
            begin = time.perf_counter()
            for call in calls:
                call()
            times.append(1e3 * (time.perf_counter() - begin) / len(calls))
    else:
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        for _ in range(2):
            graph.replay()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
        for begun, ended in events:
            begun.record()
            graph.replay()
            ended.record()
        torch.cuda.synchronize()
        times = [begun.elapsed_time(ended) / len(calls) for begun, ended in events]
    return middle(times)


def copy_bytes_per_ms(device: str) -> float:
    """Bytes read and written by a large copy on the device."""
    import torch

    source = torch.randn((1 << 27) if device == "cuda" else (1 << 22), device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / timed([lambda: target.copy_(source)], device)[0]


def calls(size: Size, device: str, dtype: Any) -> tuple[list[Callable[[], Tensor]], list[Callable[[], Tensor]]]:
    """Slot attention and PyTorch's of every set; checks that both say the same."""
    import torch
    from torch.nn import functional as F

    from specblock.cuda_ext.attention import slot_attention

    slots = size.sets * size.batch
    key, value = torch.randn(2, slots, KV_HEADS, size.capacity, HEAD_SIZE, device=device, dtype=dtype)
    query = torch.randn(size.batch, size.rows, HEADS, HEAD_SIZE, device=device, dtype=dtype).transpose(1, 2)
    lengths = torch.full((size.batch,), size.prefix, device=device)
    visible = torch.ones(size.batch, size.rows, size.rows, dtype=torch.bool, device=device).tril()
    mask = torch.ones(size.batch, size.rows, size.keys, dtype=torch.bool, device=device)
    mask[:, :, size.prefix :] = visible
    # Grouped heads are rows of one key head: keys are not repeated. The order is that of cuda_ext's reference.
    shape = (size.batch, KV_HEADS, HEADS // KV_HEADS * size.rows)
    packed = query.reshape(*shape, HEAD_SIZE)
    wide = mask[:, None].expand(-1, HEADS // KV_HEADS, -1, -1).reshape(size.batch, 1, shape[2], size.keys)

    def own(number: int) -> Callable[[], Tensor]:
        index = torch.arange(size.batch, device=device) + number * size.batch
        return lambda: slot_attention(query, key, value, index, lengths, visible)

    def torchs(number: int) -> Callable[[], Tensor]:
        chosen = slice(number * size.batch, (number + 1) * size.batch)
        keys, values = key[chosen, :, : size.keys], value[chosen, :, : size.keys]
        return lambda: F.scaled_dot_product_attention(packed, keys, values, attn_mask=wide)

    numbers = range(size.sets)
    pair = [own(number) for number in numbers], [torchs(number) for number in numbers]
    here = pair[0][-1]().float()
    there = pair[1][-1]().view(size.batch, HEADS, size.rows, HEAD_SIZE).transpose(1, 2).float()
    error = float((here - there).norm() / there.norm())
    assert error < 2e-2, f"slot attention is not attention: relative difference {error:.1e} at {size}"
    return pair


def rows(device: str) -> Iterator[Row]:
    """Times of every size: ``ratio`` is how much longer PyTorch takes, ``floor_ms`` moving the bytes alone.

    Args:
        device: "cuda"; "cpu" tries the script on two small sizes.
    """
    import torch

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.inference_mode():
        bytes_per_ms = copy_bytes_per_ms(device)
        for batch, count, prefix in SIZES if device == "cuda" else CPU_SIZES:
            size = Size(batch, count, prefix, dtype.itemsize)
            own, torchs = calls(size, device, dtype)
            ms, spread = timed(own, device)
            sdpa_ms, _ = timed(torchs, device)
            yield {
                "what": f"slot attention, {batch} x {count} rows, prefix {prefix}",
                "ms": ms,
                "iqr_ms": spread,
                "sdpa_ms": sdpa_ms,
                "ratio": sdpa_ms / ms,
                "floor_ms": size.moved_bytes / bytes_per_ms,
            }
            del own, torchs
            if device == "cuda":
                torch.cuda.empty_cache()


def show(row: Row) -> str:
    """One line of the table."""
    return (
        f"{row['what']:<44}{row['ms']:9.4f} ms (interquartile range {row['iqr_ms']:.4f}), floor "
        f"{row['floor_ms']:.4f} ms, PyTorch {row['sdpa_ms']:9.4f} ms: {row['ratio']:6.2f} times"
    )


def main() -> int:
    """Prints the table and, last, the worst ratios; 4 without a device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    options = parser.parse_args()
    if device_is_missing(options.device, "gpu-attention"):
        return 4
    import_from_checkout()
    found = []
    for row in rows(options.device):
        found.append(row)
        print(json.dumps(row) if options.json else show(row), flush=True)
    worst = min(found, key=lambda row: float(row["ratio"]))
    print(f"least gain: {worst['ratio']:.2f} times, {worst['what']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The order in which an update sees its windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from specblock.drafter.window import Window


def batches(windows: Sequence[Window], size: int, seed: int, step: int) -> Iterator[list[Window]]:
    """Endless batches from ``step`` on; the order is a function of the seed and the step alone.

    Args:
        windows: at least one.
        size: windows per batch; fewer where there are not so many.
        seed: of the order.
        step: batches before the first one.
    """
    size = min(size, len(windows))
    per_epoch = len(windows) // size
    while True:
        epoch, place = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(windows), generator=generator).tolist()
        for start in range(place * size, per_epoch * size, size):
            yield [windows[i] for i in order[start : start + size]]
            step += 1

"""The order in which an update sees its windows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from specblock.drafter.window import Window

_BATCHES_SORTED, _JITTER = 8, 0.2


def batches(windows: Sequence[Window], size: int, seed: int, step: int) -> Iterator[list[Window]]:
    """Endless batches from ``step`` on; the order is a function of the seed and the step alone.

    A batch is as long as its longest window, so windows of some batches in a row are sorted by length, roughly, and
    dealt out to them: half of the rows would else be filling. Few windows make other batches in every epoch all the
    same, and copies of a window come in different ones.

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
        order = torch.randperm(len(windows), generator=generator).tolist()[: per_epoch * size]
        found: list[list[int]] = []
        for start in range(0, len(order), _BATCHES_SORTED * size):
            stretch = order[start : start + _BATCHES_SORTED * size]
            noise = (1 + _JITTER * (2 * torch.rand(len(stretch), generator=generator) - 1)).tolist()
            copies: Counter[int] = Counter()
            keyed: list[tuple[int, float, int]] = []
            for index, factor in zip(stretch, noise, strict=True):
                copies[id(windows[index])] += 1
                keyed.append((copies[id(windows[index])], factor * len(windows[index].tokens), index))
            alike = [index for _, _, index in sorted(keyed)]
            found.extend(alike[first : first + size] for first in range(0, len(alike), size))
        for number in torch.randperm(per_epoch, generator=generator).tolist()[place:]:
            yield [windows[i] for i in found[number]]
            step += 1

"""What plain decoding costs beside speculation: looks at plain cycles, and the price that they teach.

A plain cycle after a drafted one is dearer than plain decoding is: what a drafter reads has put the target's weights
out of the cache, and where that holds them all they come back over several cycles. Looks therefore are runs of cycles,
of which the first ones teach nothing. How far plain cycles lie from the curve depends on the number of requests, so
each has its own price; one not looked at takes that of the nearest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_RUN_CYCLES, _WARMING_CYCLES = 10, 6
_ENOUGH = 8  # cycles that count, before looks become rare
_USUAL_SPEED, _MOST_OFTEN = 1.1, 4.0
_EAGER_SHARE = 0.02  # of cycles that begin a run until then
_LEAST_RATE = 0.1
_LOG_LIMIT = math.log(4.0)  # of what one cycle may say


@dataclass(slots=True)
class _Price:
    log: float = 0.0
    seen: int = 0


class PlainPrice:
    """Measured over predicted seconds of plain cycles, by size of the batch (1, 2, 3-4, 5-8, ...)."""

    def __init__(self) -> None:
        self._prices: dict[int, _Price] = {}

    def factor(self, batch: int) -> float:
        """What to multiply the prediction with; 1 before anything was seen."""
        own = _size(batch)
        price = self._prices.get(own)
        if price is None:
            if not self._prices:
                return 1.0
            price = self._prices[min(self._prices, key=lambda size: (abs(size - own), size))]
        return math.exp(price.log)

    def seen(self, batch: int) -> int:
        """Plain cycles of such a batch that were learned from."""
        price = self._prices.get(_size(batch))
        return 0 if price is None else price.seen

    def observe(self, batch: int, measured_s: float, predicted_s: float) -> None:
        """Learns from a plain cycle: the mean with a prior that counts once, then an exponential average."""
        if measured_s <= 0 or predicted_s <= 0:
            return  # a clock too coarse says nothing
        price = self._prices.setdefault(_size(batch), _Price())
        error = min(max(math.log(measured_s / predicted_s), -_LOG_LIMIT), _LOG_LIMIT)
        price.log += max(_LEAST_RATE, 1 / (price.seen + 2)) * (error - price.log)
        price.seen += 1


@dataclass(frozen=True, slots=True)
class Look:
    """A plain cycle while speculation is on; ``counts`` is False for the first ones of a run."""

    counts: bool


class PlainLooks:
    """Says which cycles are plain although speculation is on."""

    def __init__(self, share: float) -> None:
        """Args:
        share: of cycles, in the long run, where drafts make decoding 1.1 times as fast; 0 never looks. A look costs
            what drafts would have won, so there are more where they win less, and as much is lost by looking.
        """
        self._share, self._left = share, 0

    def disturbed(self) -> None:
        """The drafter's weights were read outside of a cycle: a run under way ends, its cache is cold again."""
        self._left = 0

    def next(self, draw: float, seen: int, speed: float = _USUAL_SPEED) -> Look | None:
        """Whether the coming cycle, which would speculate, is a look.

        Args:
            draw: uniform in [0, 1).
            seen: plain cycles of such a batch that were learned from.
            speed: of speculation over plain decoding, as far as known.
        """
        if self._left:
            self._left -= 1
            return Look(counts=self._left < _RUN_CYCLES - _WARMING_CYCLES)
        usual = 1 - 1 / _USUAL_SPEED
        often = usual / max(1 - 1 / speed, usual / _MOST_OFTEN)
        begins = often * self._share / _RUN_CYCLES if self._share < 1 else 1.0
        if self._share > 0 and seen < _ENOUGH:
            begins = max(begins, _EAGER_SHARE)
        if draw >= begins:
            return None
        self._left = _RUN_CYCLES - 1
        return Look(counts=False)


def _size(batch: int) -> int:
    return (batch - 1).bit_length()

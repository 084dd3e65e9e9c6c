"""Whether a drop goes on growing, and what an update against it is worth if it does. Pure reads of statistics.

Most drops come at once and stay as they are; some grow for hours, as one kind of text slowly gives way to another. Then
what an update learns of the new text pays more every hour, and waiting until the drop of now alone pays for it is
waiting for too long. A drop that has grown steadily until now is taken to have done so since it was nothing, and for as
long as that it is expected to go on, on average: who sees something at a time of no particular choice sees it, in the
mean, at half of its life.

Only blocks that show at least half of the drop are looked at, and of these not the oldest, in which the change itself
may lie: across a sudden change everything looks like a slope.

Source of the expectation: Gott, Implications of the Copernican principle for our future prospects (Nature 1993).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from specblock.bandit.acceptance import TOGETHER, Block, Level, VersionStatistics
from specblock.bandit.fall import Fall, against, with_reference

FEWEST_BLOCKS = 4
"""Blocks without which there is no slope."""

TREND_Z = 3.0
"""Standard errors by which a slope must exceed 0, to be told from noise: it is looked at hundreds of times a day."""

LEAST_SE = 1e-6
"""Where all requests are alike."""


@dataclass(frozen=True, slots=True)
class _Point:
    time_s: float
    drop: float
    se: float


def growing_s(statistics: VersionStatistics, levels: Mapping[str, Level], fall: Fall) -> float:
    """Seconds in which the drop has grown to what it is, at the rate of late; 0 if it does not grow."""
    if fall.drop <= 0:
        return 0.0
    known = with_reference(levels)
    points: list[_Point] = []
    for block in _newest_first(statistics):
        sums = against(block.strata, known)
        if sums.units < 2 or block.time_s <= 0 or 1 - sums.ratio < fall.drop / 2:
            break
        points.append(_Point(block.time_s, 1 - sums.ratio, max(sums.se, LEAST_SE)))
    del points[-1:]
    if len(points) < FEWEST_BLOCKS:
        return 0.0
    slope_per_s, se_per_s = _slope(points)
    return fall.drop / slope_per_s if slope_per_s > TREND_Z * se_per_s else 0.0


def growth(growing_s: float, lasting_s: float) -> float:
    """What a drop is on average over ``lasting_s``, in drops of now.

    It has ``growing_s`` behind it and goes on at this rate, but ends with a hazard of as much: after t seconds the
    expectation is ``2 - exp(-t / growing_s)``.
    """
    if growing_s <= 0 or lasting_s <= 0:
        return 1.0
    return 2 + growing_s / lasting_s * math.expm1(-lasting_s / growing_s)


def _newest_first(statistics: VersionStatistics) -> Iterator[Block]:
    """Everything remembered in blocks of ``TOGETHER`` windows, as far as there are so many."""
    now = Block()
    for segment in statistics.recent:
        now.add(segment)
    for block in reversed(statistics.older):
        if now.windows >= TOGETHER:
            yield now
            now = block
        else:
            now = block.plus(now)
    yield now
    yield from reversed(statistics.oldest)


def _slope(points: Sequence[_Point]) -> tuple[float, float]:
    """Weighted least squares: drop per second, and its standard error."""
    time, drop = np.array([p.time_s for p in points]), np.array([p.drop for p in points])
    weight = np.array([p.se for p in points]) ** -2.0
    centred = time - (weight * time).sum() / weight.sum()
    spread = float((weight * centred**2).sum())
    return (float((weight * centred * drop).sum()) / spread, spread**-0.5) if spread > 0 else (0.0, math.inf)

"""Ratio estimates with standard errors, from sums: sum(y) / sum(x) over independent units (segments, conversations)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

UNKNOWN_SE = 1e6
"""Standard error of a ratio that fewer than two units speak about."""


@dataclass(slots=True)
class RatioSums:
    """Sufficient sums of pairs (x, y); sums of whole numbers are exact, whatever the order."""

    units: int = 0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0

    def add(self, x: float, y: float) -> None:
        """Count one unit."""
        self.units += 1
        self.x += x
        self.y += y
        self.xx += x * x
        self.xy += x * y
        self.yy += y * y

    def plus(self, other: RatioSums) -> RatioSums:
        """The sums of both."""
        return RatioSums(
            self.units + other.units,
            self.x + other.x,
            self.y + other.y,
            self.xx + other.xx,
            self.xy + other.xy,
            self.yy + other.yy,
        )

    def scaled(self, factor: float) -> RatioSums:
        """The sums of the pairs (factor x, y)."""
        x, xx, xy = factor * self.x, factor**2 * self.xx, factor * self.xy
        return RatioSums(self.units, x, self.y, xx, xy, self.yy)

    @property
    def ratio(self) -> float:
        """sum(y) / sum(x); 0 without data."""
        return self.y / self.x if self.x > 0 else 0.0

    @property
    def se(self) -> float:
        """Delta-method standard error of the ratio."""
        if self.units < 2 or self.x <= 0:
            return UNKNOWN_SE
        return math.sqrt(self._residual * self.units / (self.units - 1)) / self.x

    @property
    def relative_variance(self) -> float | None:
        """Variance of a unit's y around the common ratio, relative to the square of the mean y; None: too few units."""
        if self.units < 2 or self.x <= 0 or self.y <= 0:
            return None
        return self._residual / (self.units - 1) / (self.y / self.units) ** 2

    @property
    def _residual(self) -> float:
        return max(0.0, self.yy - 2 * self.ratio * self.xy + self.ratio**2 * self.xx)


def agree(one: RatioSums, other: RatioSums, z: float) -> bool:
    """Whether two ratios are within ``z`` standard errors of each other; those of fewer than two units always are."""
    return abs(one.ratio - other.ratio) <= z * math.hypot(one.se, other.se)


def ratio_of(pairs: Iterable[tuple[float, float]]) -> RatioSums:
    """The sums of ``pairs`` of (x, y)."""
    sums = RatioSums()
    for x, y in pairs:
        sums.add(x, y)
    return sums


def two_sided_z(confidence: float) -> float:
    """Half-width of a central normal interval, in standard errors."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def one_sided_z(confidence: float) -> float:
    """Distance of a one-sided normal bound, in standard errors."""
    return NormalDist().inv_cdf(confidence)

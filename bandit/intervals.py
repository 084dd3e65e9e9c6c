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

    @property
    def ratio(self) -> float:
        """sum(y) / sum(x); 0 without data."""
        return self.y / self.x if self.x > 0 else 0.0

    @property
    def se(self) -> float:
        """Delta-method standard error of the ratio."""
        if self.units < 2 or self.x <= 0:
            return UNKNOWN_SE
        residual = max(0.0, self.yy - 2 * self.ratio * self.xy + self.ratio**2 * self.xx)
        return math.sqrt(residual * self.units / (self.units - 1)) / self.x


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

"""Small online estimators: a ratio that forgets, and the closest monotone sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class ForgettingRatio:
    """Ratio of two sums whose older terms fade: a mean when the denominators are counts.

    Attributes:
        half_life: observations after which a term counts half.
        numerator: faded sum.
        denominator: faded sum.
        count: observations ever, not faded.
    """

    half_life: float
    numerator: float = 0.0
    denominator: float = 0.0
    count: int = 0

    def add(self, numerator: float, denominator: float = 1.0, observations: int = 1) -> None:
        """Fades what is there by ``observations`` and adds one term."""
        keep = 0.5 ** (observations / self.half_life)
        self.numerator = keep * self.numerator + numerator
        self.denominator = keep * self.denominator + denominator
        self.count += observations

    def value(self, prior: float = 0.0, weight: float = 0.0) -> float:
        """The ratio, with a prior that counts like ``weight`` of the denominator; the prior alone without evidence."""
        return ratio(self.numerator, self.denominator, prior, weight)

    def fade(self, keep: float) -> None:
        """Keeps only this share of the evidence, at the same ratio."""
        self.numerator *= keep
        self.denominator *= keep


def ratio(numerator: float, denominator: float, prior: float, weight: float) -> float:
    """A ratio of sums with a prior that counts like ``weight`` of the denominator; the prior alone without evidence."""
    total = denominator + weight
    return (numerator + prior * weight) / total if total > 0 else prior


def non_decreasing(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The non-decreasing sequence closest to ``values`` in weighted squared distance (pool adjacent violators).

    Args:
        values: the sequence.
        weights: above 0, one per value.

    Source: Ayer et al. 1955; Barlow et al. 1972, chapter 1.
    """
    means: list[float] = []
    totals: list[float] = []
    sizes: list[int] = []
    for value, weight in zip(values, weights, strict=True):
        mean, total, size = float(value), float(weight), 1
        while means and means[-1] > mean:
            below, other = means.pop(), totals.pop()
            mean = (mean * total + below * other) / (total + other)
            total += other
            size += sizes.pop()
        means.append(mean)
        totals.append(total)
        sizes.append(size)
    return [mean for mean, size in zip(means, sizes, strict=True) for _ in range(size)]

"""Bootstrap over things that were measured in pairs: prompts, questions, conversations."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Interval = tuple[float, float]


def resampled(count: int, draws: int, seed: int = 0) -> NDArray[np.int64]:
    """Indices [draws, count] drawn with replacement; whatever belongs to one index stays together."""
    return np.random.default_rng(seed).integers(0, count, size=(draws, count))


def interval_95(draws: ArrayLike) -> Interval:
    """The middle 95 % of a statistic's draws."""
    low, high = np.quantile(np.asarray(draws, dtype=np.float64), [0.025, 0.975])
    return float(low), float(high)

"""What is believed about an arm's gain: conjugate normal regression with a configured prior and discounted evidence.

Only the *evidence* is state (and lives in the snapshot); the prior is added when a prediction is made, so a changed
configuration applies to everything learned before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from specblock.bandit.cost import Belief

DISCOUNT = 0.98
"""Weight of older evidence at each new observation: about the last fifty count."""

GAIN_NOISE_SD = 0.01
"""Variation of an arm's gain from one update to the next, beyond the measurement's own error."""

MIN_SD = 1e-6
"""A prior of standard deviation 0 means "known"; this keeps its precision finite."""


@dataclass(frozen=True, slots=True)
class LinearPrior:
    """Independent normal prior of the coefficients of ``y = base + slope * x``."""

    base: float
    base_sd: float
    slope: float
    slope_sd: float


@dataclass(frozen=True, slots=True)
class LinearEvidence:
    """Discounted sums over observations (x, y) of 1, x, x^2, y and x y, each over the noise variance."""

    count: int = 0
    weight: float = 0.0
    x: float = 0.0
    xx: float = 0.0
    y: float = 0.0
    xy: float = 0.0

    def observe(self, x: float, y: float, noise_sd: float) -> LinearEvidence:
        """Evidence with one more observation ``y`` at ``x`` whose standard error is ``noise_sd``."""
        w = max(noise_sd, MIN_SD) ** -2
        return LinearEvidence(
            self.count + 1,
            DISCOUNT * self.weight + w,
            DISCOUNT * self.x + w * x,
            DISCOUNT * self.xx + w * x * x,
            DISCOUNT * self.y + w * y,
            DISCOUNT * self.xy + w * x * y,
        )

    def predict(self, x: float, prior: LinearPrior) -> Belief:
        """The posterior of ``base + slope * x`` (no observation noise)."""
        p0, p1 = max(prior.base_sd, MIN_SD) ** -2, max(prior.slope_sd, MIN_SD) ** -2
        a00, a01, a11 = self.weight + p0, self.x, self.xx + p1
        b0, b1 = self.y + p0 * prior.base, self.xy + p1 * prior.slope
        det = a00 * a11 - a01 * a01
        base, slope = (a11 * b0 - a01 * b1) / det, (a00 * b1 - a01 * b0) / det
        variance = (a11 - 2 * a01 * x + a00 * x * x) / det
        return Belief(mean=base + slope * x, sd=math.sqrt(max(variance, 0.0)))

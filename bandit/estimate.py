"""Beliefs about noisy quantities: conjugate normal, with a prior from the configuration and discounted evidence.

Only the *evidence* is state (and lives in the snapshot); the prior is added when a prediction is made, so a changed
configuration applies to everything learned before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DISCOUNT = 0.98
"""Weight of older evidence at each new observation: about the last fifty count."""

MIN_SD = 1e-6
"""A prior of standard deviation 0 means "known"; this keeps its precision finite."""


@dataclass(frozen=True, slots=True)
class Normal:
    """A predicted quantity: mean and standard deviation of what is believed about it."""

    mean: float
    sd: float


@dataclass(frozen=True, slots=True)
class ScalarEvidence:
    """Discounted weighted observations of one positive number (seconds, seconds per position)."""

    weight: float = 0.0
    total: float = 0.0

    def observe(self, value: float, weight: float = 1.0) -> ScalarEvidence:
        """Evidence with one more observation; ``weight`` 1 is a complete one."""
        return ScalarEvidence(DISCOUNT * self.weight + weight, DISCOUNT * self.total + weight * value)

    def predict(self, prior_mean: float, prior_strength: float, relative_sd: float) -> Normal:
        """The next observation, its own noise included.

        Args:
            prior_mean: in the unit of the observations.
            prior_strength: weight of the prior, in observations.
            relative_sd: noise of one observation, relative to the mean.
        """
        weight = prior_strength + self.weight
        mean = (prior_strength * prior_mean + self.total) / weight
        return Normal(mean, relative_sd * mean * math.sqrt(1 + 1 / weight))


@dataclass(frozen=True, slots=True)
class LinearPrior:
    """Independent normal prior of the two coefficients of ``y = w0 * x0 + w1 * x1``."""

    mean0: float
    sd0: float
    mean1: float
    sd1: float


@dataclass(frozen=True, slots=True)
class LinearEvidence:
    """Discounted sums of ``x x'`` and ``x y`` over the noise variance, of a regression with two coefficients."""

    count: int = 0
    a00: float = 0.0
    a01: float = 0.0
    a11: float = 0.0
    b0: float = 0.0
    b1: float = 0.0

    def observe(self, x0: float, x1: float, y: float, noise_sd: float) -> LinearEvidence:
        """Evidence with one more observation ``y`` whose standard error is ``noise_sd``."""
        w = 1 / max(noise_sd, MIN_SD) ** 2
        return LinearEvidence(
            self.count + 1,
            DISCOUNT * self.a00 + w * x0 * x0,
            DISCOUNT * self.a01 + w * x0 * x1,
            DISCOUNT * self.a11 + w * x1 * x1,
            DISCOUNT * self.b0 + w * x0 * y,
            DISCOUNT * self.b1 + w * x1 * y,
        )

    def predict(self, x0: float, x1: float, prior: LinearPrior) -> Normal:
        """The posterior of ``w0 * x0 + w1 * x1`` (no observation noise)."""
        p0, p1 = max(prior.sd0, MIN_SD) ** -2, max(prior.sd1, MIN_SD) ** -2
        a00, a01, a11 = self.a00 + p0, self.a01, self.a11 + p1
        b0, b1 = self.b0 + p0 * prior.mean0, self.b1 + p1 * prior.mean1
        det = a00 * a11 - a01 * a01
        w0, w1 = (a11 * b0 - a01 * b1) / det, (a00 * b1 - a01 * b0) / det
        variance = (a11 * x0 * x0 - 2 * a01 * x0 * x1 + a00 * x1 * x1) / det
        return Normal(w0 * x0 + w1 * x1, math.sqrt(max(variance, 0.0)))


def combine(prior: Normal, measured: float, share: float, noise_sd: float) -> Normal:
    """Posterior of ``r`` given ``measured = share * r + noise``."""
    prior_precision = max(prior.sd, MIN_SD) ** -2
    precision = prior_precision + (share / max(noise_sd, MIN_SD)) ** 2
    mean = (prior_precision * prior.mean + share * measured / max(noise_sd, MIN_SD) ** 2) / precision
    return Normal(mean, math.sqrt(1 / precision))

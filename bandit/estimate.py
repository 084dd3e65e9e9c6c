"""What is believed about an arm's gain: conjugate normal regression with a configured prior and discounted evidence.

Only the *evidence* is state (and lives in the snapshot); the prior is added when a prediction is made, so a changed
configuration applies to everything learned before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from specblock.bandit.cost import Belief

DISCOUNT = 0.9
"""Weight of older evidence at each new observation: about the last ten count."""

GAIN_NOISE_SD, GAIN_LUCK = 0.01, 0.2
"""Variation of an arm's gain from one update to the next, beyond the measurement's own error: absolute, and relative to
the gain itself."""

FEWEST_COMPARED = 8
"""Conversations without which a comparison is not worth remembering: a few agree by chance."""

WHOLE = Belief(mean=1.0, sd=0.0)
"""Share of its gain that a complete update shows."""

SHARE_NOISE_SD = 0.05
"""Variation of that share from one update to the next."""

MIN_SHARE, MIN_SHOWN = 0.05, 0.02
"""Smallest share of a gain that a trial is taken to show, and smallest gain a share is learned from."""

MIN_SD = 1e-6
"""A prior of standard deviation 0 means "known"; this keeps its precision finite."""


@dataclass(frozen=True, slots=True)
class ShareEvidence:
    """What share of a complete update's gain its trial showed: pairs seen so far, summed over their noise variance."""

    count: int = 0
    weight: float = 0.0
    shown: float = 0.0

    def observe(self, trial: Belief, complete: Belief) -> ShareEvidence:
        """With one more pair; a complete gain that is not clearly above 0 says nothing about shares."""
        if complete.mean < MIN_SHOWN or complete.mean < 2 * complete.sd:
            return self
        share = trial.mean / complete.mean
        noise_sd = math.hypot(trial.sd, share * complete.sd, SHARE_NOISE_SD * complete.mean) / complete.mean
        weight = noise_sd**-2
        return ShareEvidence(self.count + 1, DISCOUNT * self.weight + weight, DISCOUNT * self.shown + weight * share)

    def belief(self, prior: Belief) -> Belief:
        """The posterior of the share; never so near 0 that a trial would stand for any gain whatever."""
        p = max(prior.sd, MIN_SD) ** -2
        mean = (p * prior.mean + self.shown) / (p + self.weight)
        return Belief(mean=min(max(mean, MIN_SHARE), 1.0), sd=math.hypot((p + self.weight) ** -0.5, SHARE_NOISE_SD))


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

    def faded(self, kept: float) -> LinearEvidence:
        """The evidence, weighing ``kept`` of what it did."""
        sums = (self.weight, self.x, self.xx, self.y, self.xy)
        return LinearEvidence(self.count, *(kept * one for one in sums))

    def predict(self, x: float, prior: LinearPrior) -> Belief:
        """The posterior of ``base + slope * x`` (no observation noise)."""
        p0, p1 = max(prior.base_sd, MIN_SD) ** -2, max(prior.slope_sd, MIN_SD) ** -2
        a00, a01, a11 = self.weight + p0, self.x, self.xx + p1
        b0, b1 = self.y + p0 * prior.base, self.xy + p1 * prior.slope
        det = a00 * a11 - a01 * a01
        base, slope = (a11 * b0 - a01 * b1) / det, (a00 * b1 - a01 * b0) / det
        variance = (a11 - 2 * a01 * x + a00 * x * x) / det
        return Belief(mean=base + slope * x, sd=math.sqrt(max(variance, 0.0)))

"""What earlier versions are known to save. Pure."""

from __future__ import annotations

import math

from specblock.bandit.config import PolicyConfig
from specblock.bandit.cost import DomainGain
from specblock.bandit.decision import PastLevel, Target
from specblock.bandit.estimate import GAIN_LUCK, GAIN_NOISE_SD

PAST_Z = 3.0
"""Standard errors at which what an earlier version had is as likely to be noise as to be better than what is now."""


def past_gain(level: PastLevel, target: Target, config: PolicyConfig) -> DomainGain:
    """Relative saving expected of a version that has served the domain before: what it had then, or nothing.

    As with drops, the largest of many noisy differences looks like a gain, and there are as many as versions and
    decisions: a difference is real with a probability, and the two cases are weighed. A loss counts as it is.
    """
    better = level.drop > config.min_drop
    real = real_share(level.drop / level.drop_se) if better and level.drop_se > 0 else 1.0
    mean = real * level.drop if better or level.drop < 0 else 0.0
    either = math.sqrt(real * (1 - real)) * level.drop
    sd = math.hypot(level.drop_se, either, GAIN_NOISE_SD, GAIN_LUCK * mean)
    return DomainGain(domain=target.domain, share=target.share, mean=mean, sd=sd)


def real_share(z: float) -> float:
    """Probability that a difference of ``z`` standard errors is one at all, and not the largest of many noisy ones.

    What was seen is at most ``exp(z^2 / 2)`` times as likely if the difference is one as if it is none; the odds
    beforehand are such that ``PAST_Z`` makes them even.
    """
    return 1 / (1 + math.exp(min((PAST_Z**2 - z**2) / 2, 50.0)))


def best_past(target: Target, config: PolicyConfig) -> float:
    """The most that an earlier version is known to save in a domain; 0 if none is known to save anything."""
    return max([0.0, *(past_gain(level, target, config).mean for level in target.past)])

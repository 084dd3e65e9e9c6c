"""What earlier versions are known to save. Pure."""

from __future__ import annotations

import math

from specblock.bandit.config import PolicyConfig
from specblock.bandit.cost import DomainGain
from specblock.bandit.decision import PastLevel, Target
from specblock.bandit.estimate import GAIN_LUCK, GAIN_NOISE_SD

PAST_Z = 3.0
"""Standard errors by which what an earlier version had must exceed what is now, to be told from noise."""


def past_gain(level: PastLevel, target: Target, config: PolicyConfig) -> DomainGain:
    """Relative saving expected of a version that has served the domain before: what it had then.

    As with drops, the largest of many noisy differences looks like a gain, and there are as many as versions and
    decisions; a loss counts as it is.
    """
    told = level.drop < 0 or level.drop > max(config.min_drop, PAST_Z * level.drop_se)
    mean = level.drop if told else 0.0
    sd = math.hypot(level.drop_se, GAIN_NOISE_SD, GAIN_LUCK * mean)
    return DomainGain(domain=target.domain, share=target.share, mean=mean, sd=sd)


def best_past(target: Target, config: PolicyConfig) -> float:
    """The most that an earlier version is known to save in a domain; 0 if none is known to save anything."""
    return max([0.0, *(past_gain(level, target, config).mean for level in target.past)])

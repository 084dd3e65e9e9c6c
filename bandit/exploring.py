"""Trying what narrowly fails the bound, now and then and with a logged probability, so that skipped gains are seen too.

A rule that learns only from the updates it makes never finds out that it is too careful. Exploring risks a
micro-profile: whether the rest is trained is decided as ever, on the gain it measured, and the gate looks at all of it.
"""

from __future__ import annotations

import hashlib
import math

from specblock.bandit.config_rules import ExploreConfig
from specblock.bandit.cost import NetValue

MOST_SHARE = 0.1
"""A decision stands for no more than this share of ``every_s``: what happened in a long pause is not known."""


def near_margin(value: NetValue) -> bool:
    """Whether an arm is expected to pay, but not surely enough."""
    return value.net_lower <= 0 < value.net


def explore_probability(since_s: float, config: ExploreConfig) -> float:
    """Chance that a decision near the margin explores, ``since_s`` seconds after the decision before.

    It depends on the time and not on the number of decisions: however often one is taken, an arm that stays near the
    margin is explored every ``every_s`` seconds on average.
    """
    return -math.expm1(-min(since_s / config.every_s, MOST_SHARE)) if config.every_s > 0 else 0.0


def draw(now_s: float, config: ExploreConfig) -> float:
    """Uniform in [0, 1): a function of the seed and the time of the decision, so that a replay draws the same."""
    number = hashlib.sha256(f"{config.seed} {now_s!r}".encode()).digest()[:8]
    return (int.from_bytes(number, "big") >> 11) * 2.0**-53

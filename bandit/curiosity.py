"""What it is worth to find out how the base would do on text that it has not served. Pure."""

from __future__ import annotations

import math
from statistics import NormalDist

from specblock.bandit.config import PolicyConfig
from specblock.bandit.cost import NetValue
from specblock.bandit.decision import DecisionContext, PolicyState
from specblock.bandit.estimate import FEWEST_COMPARED
from specblock.bandit.forecast import pair_s
from specblock.bandit.reach import targets

CURIOUS_SHARE = 0.5
"""Share of traffic of which nothing must be known under the base before it is compared to find out."""


def trial_s(state: PolicyState, config: PolicyConfig) -> float:
    """What comparing two stored versions on as many conversations as a trial takes is charged with."""
    return config.cost.price * config.probe_conversations * pair_s(state, config).mean


def curiosity_s(value: NetValue, context: DecisionContext, state: PolicyState, config: PolicyConfig) -> float:
    """Expected device-seconds that come of comparing the base, of which nothing is known here, the comparison paid.

    What turns out to lose is not done: the expected improvement of Bayesian optimisation. 0 where something is known of
    it, or where there is too little text to tell.
    """
    here = [t for t in targets(context, config) if t.there and t.level(context.base) is None]
    heldout = {d.domain: d.num_heldout for d in context.domains}
    enough = max(config.probe_conversations / 2, FEWEST_COMPARED)
    share = math.fsum(t.share for t in here if heldout[t.domain] >= enough)
    if share < CURIOUS_SHARE:
        return 0.0
    paid_s = trial_s(state, config)
    mean, sd, normal = value.net + paid_s, max(value.net_sd, 1e-9), NormalDist()
    return max(0.0, mean * normal.cdf(mean / sd) + sd * normal.pdf(mean / sd) - paid_s)

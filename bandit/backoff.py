"""How long to wait after an update: its cool-down if it gained, else until what it cost is small. Pure."""

from __future__ import annotations

import math

from specblock.bandit.config import Arm, PolicyConfig
from specblock.bandit.decision import PolicyState, Target
from specblock.bandit.reach import mean_drop


def cooldown_left_s(
    arm: Arm, now_s: float, state: PolicyState, config: PolicyConfig, reached: tuple[Target, ...], busy_devices: float
) -> float:
    """Seconds until ``arm`` may be used; a drop that has grown ends the back-off, not the plain cool-down.

    An update without a gain makes the next one of its sort wait until what it cost is ``waste_share`` of serving, so
    that being wrong again and again can never cost more than that. Only those that were shown not to pay make it wait
    longer still with each in a row: one whose interval still contained a gain that pays is hardly evidence against the
    next.
    """
    if state.ended_s == 0.0:
        return 0.0
    plain_s = state.ended_s + state.cooldown_s
    failed = state.back_off(arm)
    # After an update that no drop had asked for, any noise would be a growth.
    noise = config.drop_z * math.fsum(target.share * target.drop_se for target in reached)
    least = max(config.evidence_growth * failed.drop, failed.drop + noise, config.min_drop)
    # Beyond 64 doublings the cap has long been reached, and a float power would overflow.
    rounds = 0 if mean_drop(reached) > least else min(failed.in_row, 64)
    wait_s = 0.0
    if rounds:
        wasted_s = failed.wasted_s / (config.waste_share * max(busy_devices, 0.01))
        wait_s = max(arm.cooldown_s * config.backoff_factor**rounds, wasted_s * config.backoff_factor ** (rounds - 1))
        wait_s = min(wait_s, max(config.backoff_max_s, arm.cooldown_s))
    return max(0.0, plain_s - now_s, failed.ended_s + wait_s - now_s)

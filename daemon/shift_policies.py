"""The policies that ``bench shift`` compares, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from specblock.bandit.config import PolicyConfig
from specblock.bandit.simulation.baselines import Always, DualAverage, EveryN, Never
from specblock.bandit.simulation.rule import RealRule
from specblock.bandit.simulation.run import Driver
from specblock.daemon.config import DaemonConfig
from specblock.daemon.shift_world import RecordedWorld

STATIC, COST_AWARE = "static", "cost_aware"
Builder = Callable[[RecordedWorld, Path], Driver]


def policies(rules: PolicyConfig, requests_per_phase: int, config: DaemonConfig) -> dict[str, Builder]:
    """Every policy by name, in the order of the table; schedules train the last arm, the most thorough one.

    Args:
        rules: arms, prices and cool-downs of every policy.
        requests_per_phase: on average; schedules that train every N requests take 0.3, 0.7 and 2.3 of it.
        config: pace of the real rule.
    """
    trained = [arm.name for arm in rules.arms if arm.steps > 0]
    full, pace = trained[-1], config.adaptation
    every = {f"every_{n}": _every(rules, full, n) for n in _schedules(requests_per_phase)}
    return {
        STATIC: lambda world, directory: Never(world, rules),
        **{f"always_{name}": _always(rules, name) for name in trained},
        **every,
        "dual_ema": lambda world, directory: DualAverage(world, rules, full),
        COST_AWARE: lambda world, directory: RealRule(
            world,
            rules,
            directory,
            decide_every_s=pace.decide_every_s,
            decide_every_events=pace.decide_every_events,
        ),
    }


def small_policies(requests_per_phase: int) -> tuple[str, ...]:
    """The four of a small run."""
    return (STATIC, f"every_{_schedules(requests_per_phase)[1]}", "dual_ema", COST_AWARE)


def _schedules(requests_per_phase: int) -> tuple[int, ...]:
    # No multiples of a phase: a schedule does not know when text changes, so its updates must fall anywhere in a phase.
    return tuple(max(1, round(share * requests_per_phase)) for share in (0.3, 0.7, 2.3))


def _always(rules: PolicyConfig, arm: str) -> Builder:
    return lambda world, directory: Always(world, rules, arm)


def _every(rules: PolicyConfig, arm: str, requests: int) -> Builder:
    return lambda world, directory: EveryN(world, rules, arm, requests)

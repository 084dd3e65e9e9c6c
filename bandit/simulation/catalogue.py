"""The policies of the comparison by name, and running one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from specblock.bandit.config import PolicyConfig
from specblock.bandit.ledger import read_ledger
from specblock.bandit.simulation.baselines import Always, DualAverage, EveryN, ModelFree, Never
from specblock.bandit.simulation.calibration import surprises
from specblock.bandit.simulation.curves import Curves
from specblock.bandit.simulation.drafters import described_steps
from specblock.bandit.simulation.oracle import Oracle
from specblock.bandit.simulation.rule import RealRule
from specblock.bandit.simulation.run import Driver, Outcome, drive
from specblock.bandit.simulation.scenario import Scenario, make_traffic
from specblock.bandit.simulation.world import World

ORACLE, NEVER, COST_AWARE, WITHOUT_RESIDUAL = "oracle", "never", "cost_aware", "without_residual"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How long and how densely the world is simulated.

    Attributes:
        policy: the decision rule's numbers, prices and cool-downs for every policy.
        curves: of the world.
        duration_s: simulated seconds of one run.
        rate_per_s: requests per second.
        tick_s: time between two looks of a policy.
        decide_every_s: longest time between two decisions of the real rule.
        decide_every_events: requests without which it decides nothing new.
        every_n: request counts of the fixed schedules.
    """

    policy: PolicyConfig
    curves: Curves
    duration_s: float = 7200.0
    rate_per_s: float = 1.6
    tick_s: float = 20.0
    decide_every_s: float = 60.0
    decide_every_events: int = 32
    every_n: tuple[int, int, int] = (80, 400, 1600)


Builder = Callable[[World, Settings, Path], Driver]


def policies(settings: Settings) -> dict[str, Builder]:
    """Every policy by name, in the order of the table.

    Raises:
        ValueError: an arm of the policy has no learning curve.
    """
    arms = [arm for arm in settings.policy.arms if arm.steps > 0]
    for arm in arms:
        described_steps(arm, settings.curves)
    if not arms:
        raise ValueError("the policy has no arm that trains, so there is nothing to compare")
    trained = [arm.name for arm in arms]
    # Fixed schedules update the whole drafter, as their models do; the last arm is the most thorough one.
    full = trained[-1]
    schedules = {f"always_{name}": _always(name) for name in trained}
    every = {f"every_{count}": _every(full, count) for count in settings.every_n}
    return {
        NEVER: lambda world, chosen, directory: Never(world, chosen.policy),
        **schedules,
        **every,
        "dual_ema": lambda world, chosen, directory: DualAverage(world, chosen.policy, full),
        "without_model": lambda world, chosen, directory: ModelFree(world, chosen.policy),
        WITHOUT_RESIDUAL: lambda world, chosen, directory: _rule(world, chosen, directory, forget=True),
        COST_AWARE: lambda world, chosen, directory: _rule(world, chosen, directory, forget=False),
        ORACLE: lambda world, chosen, directory: Oracle(world, chosen.policy),
    }


def simulate(scenario: Scenario, policy: str, seed: int, settings: Settings, directory: Path) -> Outcome:
    """One policy through one run of a scenario; the same seed gives all policies the same traffic.

    Args:
        scenario: what happens.
        policy: name in :func:`policies`.
        seed: of traffic and of the world's chance.
        settings: the rest.
        directory: empty; the real rule writes its ledger and snapshots there.
    """
    curves = settings.curves
    traffic = make_traffic(scenario, curves, seed, settings.duration_s, settings.rate_per_s)
    world = World(traffic, curves, settings.policy.cost, seed)
    driver = policies(settings)[policy](world, settings, directory)
    drive(world, driver, settings.tick_s)
    return Outcome(
        scenario=scenario.name,
        policy=policy,
        seed=seed,
        tokens=world.tokens,
        serving_s=world.serving_s,
        charged_s=world.charged_s,
        updates=world.updates,
        trainings=world.trainings,
        rollbacks=world.rollbacks,
        faults=driver.faults() if isinstance(driver, RealRule) else None,
        surprises=surprises(read_ledger(driver.ledger_path)) if isinstance(driver, RealRule) else (),
    )


def _always(arm: str) -> Builder:
    return lambda world, settings, directory: Always(world, settings.policy, arm)


def _every(arm: str, requests: int) -> Builder:
    return lambda world, settings, directory: EveryN(world, settings.policy, arm, requests)


def _rule(world: World, settings: Settings, directory: Path, *, forget: bool) -> RealRule:
    return RealRule(
        world,
        settings.policy,
        directory,
        decide_every_s=settings.decide_every_s,
        decide_every_events=settings.decide_every_events,
        forget_gains=forget,
    )

"""Outcomes of all policies side by side, averaged over seeds. Everything in it is modelled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from specblock.bandit.simulation.catalogue import NEVER, ORACLE
from specblock.bandit.simulation.run import Outcome

MIN_GAIN = 0.01
"""Gain of the oracle over doing nothing below which there is nothing to miss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One policy in one scenario: means over the seeds.

    Attributes:
        net_tokens_per_s: tokens per device-second, every cost charged.
        gross_tokens_per_s: tokens per device-second of serving.
        updates: versions that went live.
        trainings: updates begun.
        cost_device_s: device-seconds charged.
        regret: share of the oracle's net tokens per second that is lost; negative: luck.
        saved: share of the device-seconds of doing nothing that is saved, every cost charged; negative: a loss.
        saved_se: its standard error over the seeds; 0 with one seed.
        missed: share of what the oracle saves that is missed; None where it saves less than ``MIN_GAIN``.
        faults: decisions that reported a fault; None for policies that cannot.
        seeds: runs.
    """

    scenario: str
    policy: str
    net_tokens_per_s: float
    gross_tokens_per_s: float
    updates: float
    trainings: float
    cost_device_s: float
    regret: float
    saved: float
    saved_se: float
    missed: float | None
    faults: float | None
    seeds: int


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """One row per scenario and policy, in the order they first occur."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.scenario, outcome.policy), []).append(outcome)
    return [_row(group, groups[scenario, ORACLE], groups[scenario, NEVER]) for (scenario, _), group in groups.items()]


def _row(group: list[Outcome], oracle: list[Outcome], never: list[Outcome]) -> Row:
    best = {outcome.seed: outcome.net_tokens_per_s for outcome in oracle}
    nothing = {outcome.seed: outcome.total_s for outcome in never}
    saved = [1 - o.total_s / nothing[o.seed] for o in group]
    most = fmean(1 - o.total_s / nothing[o.seed] for o in oracle)
    faults = [outcome.faults for outcome in group if outcome.faults is not None]
    return Row(
        scenario=group[0].scenario,
        policy=group[0].policy,
        net_tokens_per_s=fmean(o.net_tokens_per_s for o in group),
        gross_tokens_per_s=fmean(o.gross_tokens_per_s for o in group),
        updates=fmean(o.updates for o in group),
        trainings=fmean(o.trainings for o in group),
        cost_device_s=fmean(o.charged_s for o in group),
        regret=fmean(1 - o.net_tokens_per_s / best[o.seed] for o in group),
        saved=fmean(saved),
        saved_se=stdev(saved) / len(saved) ** 0.5 if len(saved) > 1 else 0.0,
        missed=1 - fmean(saved) / most if most > MIN_GAIN else None,
        faults=fmean(faults) if faults else None,
        seeds=len(group),
    )


def lines(table: Sequence[Row]) -> Iterator[str]:
    """The table for people."""
    yield (
        f"{'scenario':<12}{'policy':<18}{'net tok/s':>10}{'gross tok/s':>12}{'updates':>9}{'trials':>8}"
        f"{'cost dev-s':>12}{'regret':>9}{'faults':>8}{'saved':>17}{'missed':>8}"
    )
    for row in table:
        faults = "-" if row.faults is None else f"{row.faults:.0f}"
        yield (
            f"{row.scenario:<12}{row.policy:<18}{row.net_tokens_per_s:>10.1f}{row.gross_tokens_per_s:>12.1f}"
            f"{row.updates:>9.1f}{row.trainings:>8.1f}{row.cost_device_s:>12.1f}{row.regret:>9.1%}{faults:>8}"
            f"{row.saved:>+10.2%} ±{row.saved_se:>5.2%}{'-' if row.missed is None else format(row.missed, '.0%'):>8}"
        )

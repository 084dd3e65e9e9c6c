"""``specblockd bench shift | stationary | fault``: every policy on the same traffic, with real drafters and training.

Recorded text arrives in simulated time; see ``shift_world``. All policies pay the same prices, and each starts from the
same base drafter in a registry of its own.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from specblock.bandit.simulation.rule import RealRule
from specblock.bandit.simulation.run import drive
from specblock.daemon.bench_breakeven_stage import Sizes, Stage, adaptable
from specblock.daemon.cli_replay import rule
from specblock.daemon.config import DaemonConfig
from specblock.daemon.errors import ConfigError
from specblock.daemon.facts import facts
from specblock.daemon.shift_curves import curves
from specblock.daemon.shift_live import LivePhase, live_lines, live_rows
from specblock.daemon.shift_policies import COST_AWARE, STATIC, Builder, policies, small_policies
from specblock.daemon.shift_recording import Pools, record, requests_per_s
from specblock.daemon.shift_rows import PolicyRun, ShiftRow, lines, shift_rows
from specblock.daemon.shift_traffic import PhasePlan, ShiftTraffic, make_shift
from specblock.daemon.shift_world import RecordedWorld

PHASES = {
    "shift": ("python", "cpp", "javascript", "manual") * 2,
    "stationary": ("python",) * 4,
    "fault": ("python",) * 3,
}
"""Kinds of text, phase by phase."""
FAULT_AT = 1 / 3
TICK_S = 20.0
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftSettings:
    """What to run.

    Attributes:
        config: policy file of the decision rule, with the models.
        story: shift, stationary or fault.
        sizes: recorded conversations per kind of text.
        policies: names; empty: all of :func:`policies`.
        phases: kinds of text, one after the other; empty: the story's.
        hours: simulated length of a phase.
        busy: share of the device's time that serving takes with the base drafter.
        seeds: runs, with traffic of their own.
        live: conversations of every phase that are served live, too, for static and cost_aware; 0 for none.
        out: directory for the JSON and the page; None writes neither.
    """

    config: Path
    story: str
    sizes: Sizes
    policies: tuple[str, ...] = ()
    phases: tuple[str, ...] = ()
    hours: float = 2.0
    busy: float = 0.65
    seeds: int = 1
    live: int = 64
    out: Path | None = None


def run(settings: ShiftSettings, small: bool, as_json: bool, say: Say) -> int:
    """Records, runs every policy, prints; returns the exit code.

    Raises:
        ConfigError: there is nothing to adapt, or a policy's name is wrong.
        DependencyError: a file of prompts is missing.
    """
    phases = settings.phases or PHASES[settings.story]
    sizes = replace(settings.sizes, domains=tuple(dict.fromkeys(phases)))
    config = adaptable(settings.config, sizes)
    if settings.policies and STATIC not in settings.policies:
        raise ConfigError(f"policies are compared with {STATIC}: name it too")
    torch.set_num_threads(config.trainer.threads)
    # Before measuring: what ran is the code of now, whatever is committed meanwhile.
    known = _facts(settings, config, phases)
    rules = rule(config)
    with tempfile.TemporaryDirectory(prefix="specblock-shift-") as state:
        pools, cycle_s = record(config, rules, sizes, Path(state) / "recording", say)
        rate = requests_per_s(pools, cycle_s, settings.busy)
        requests = round(rate * settings.hours * 3600)
        builders = policies(rules, requests, config)
        names = settings.policies or (small_policies(requests) if small else tuple(builders))
        if unknown := [name for name in names if name not in builders]:
            raise ConfigError(f"no policy is called {unknown[0]!r}; there are {', '.join(builders)}")
        plan = PhasePlan(
            domains=phases,
            phase_s=settings.hours * 3600,
            requests_per_s=rate,
            heldout_fraction=config.windows.heldout_fraction,
            fault_at=FAULT_AT if settings.story == "fault" else 2.0,
        )
        traffic = {seed: _traffic(replace(plan, seed=seed), pools) for seed in range(settings.seeds)}
        if any(set(own.phase.tolist()) != set(range(len(phases))) for own in traffic.values()):
            raise ConfigError("a phase has no request at all: longer --hours, or a larger --busy")
        say(f"{rate:.2f} requests a second, {requests} in each phase of {settings.hours:g} h: {', '.join(phases)}")
        runs: list[PolicyRun] = []
        live: dict[tuple[str, int], tuple[Sequence[LivePhase], float]] = {}
        for seed, own in traffic.items():
            for name in names:
                bench = Stage(config, rules, sizes, Path(state) / f"{name}-{seed}")
                try:
                    served = settings.live if name in (STATIC, COST_AWARE) and settings.story != "fault" else 0
                    world = RecordedWorld(bench, pools, own, rules.cost, cycle_s, served)
                    runs.append(_one(name, seed, builders[name], world, Path(state) / f"{name}-{seed}-bandit"))
                finally:
                    bench.host.close()
                if world.live_phases:
                    live[name, seed] = (world.live_phases, world.charged_s)
                say(_line(runs[-1]))
    compared = live_rows(live, traffic, STATIC)
    result = _result(settings, phases, runs, traffic, known | {"cycle_s": cycle_s, "requests_per_s": rate})
    result["live"] = [asdict(row) for row in compared]
    result["live_phases"] = [
        {"policy": name, "seed": seed} | asdict(one) for (name, seed), (own, _) in live.items() for one in own
    ]
    if settings.out is not None:
        from specblock.daemon.shift_report import write_shift_report

        settings.out.mkdir(parents=True, exist_ok=True)
        (settings.out / f"{settings.story}.json").write_text(json.dumps(result, indent=2) + "\n")
        say(f"page: {write_shift_report(settings.out / f'{settings.story}.html', result)}")
    if as_json:
        say(json.dumps(result, indent=2))
        return 0
    for line in (*_table(shift_rows(runs, traffic, STATIC)), *live_lines(compared)):
        say(line)
    return 0


def _result(
    settings: ShiftSettings,
    phases: Sequence[str],
    runs: Sequence[PolicyRun],
    traffic: dict[int, ShiftTraffic],
    known: dict[str, Any],
) -> dict[str, Any]:
    """The JSON object: ``facts``, ``rows``, and ``curves`` of the first run."""
    first = min(traffic)
    return {
        "facts": known,
        "phases": list(phases),
        "phase_hours": settings.hours,
        "rows": [asdict(row) for row in shift_rows(runs, traffic, STATIC)],
        "curves": [asdict(one) for one in curves([r for r in runs if r.seed == first], traffic[first], STATIC)],
    }


def _traffic(plan: PhasePlan, pools: Pools) -> ShiftTraffic:
    held, train = ({domain: len(own) for domain, own in side.items()} for side in (pools.heldout, pools.train))
    return make_shift(plan, held, train)


def _one(name: str, seed: int, build: Builder, world: RecordedWorld, directory: Path) -> PolicyRun:
    directory.mkdir()
    begin = time.perf_counter()
    driver = build(world, directory)
    drive(world, driver, TICK_S)
    return PolicyRun(
        policy=name,
        seed=seed,
        tokens=world.tokens,
        request_s=world.request_s[: world.served],
        cycles=world.cycles[: world.served],
        committed=world.committed[: world.served],
        charged_s=world.charged_s,
        updates=world.updates,
        trainings=world.trainings,
        rollbacks=world.rollbacks,
        faults=driver.faults() if isinstance(driver, RealRule) else None,
        wall_s=time.perf_counter() - begin,
        charges=tuple(world.charges),
        promoted_s=tuple(world.promoted_s),
    )


def _line(one: PolicyRun) -> str:
    return (
        f"{one.policy} (seed {one.seed}): {one.tokens / one.total_s:.1f} net tokens/s, acceptance "
        f"{one.committed.sum() / one.cycles.sum():.2f}, {one.updates} updates of {one.trainings} trainings, charged "
        f"{one.charged_s:.0f} device-s, {one.wall_s:.0f} s"
    )


def _table(rows: Sequence[ShiftRow]) -> list[str]:
    return [
        *lines(rows),
        "",
        "net counts every cost; x static: net tokens per device-second over those of doing nothing; recovered: phases "
        "in which acceptance came back to 95 % of the best plateau, of those in which doing nothing did not; oracle: "
        "what the fastest policy of every phase's last quarter takes, all along and free of charge, an estimate of "
        "what there is to win. Text, drafters, training, scoring and swaps are real; time is simulated, a cycle takes "
        "what was measured.",
    ]


def _facts(settings: ShiftSettings, config: DaemonConfig, phases: Sequence[str]) -> dict[str, Any]:
    return dict(
        facts(
            config.target.device,
            dtype=config.target.dtype,
            config=str(settings.config),
            story=settings.story,
            phases=" ".join(phases),
            phase_hours=settings.hours,
            busy=settings.busy,
            seeds=settings.seeds,
            **settings.sizes.facts(),
        )
    )

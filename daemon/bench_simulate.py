"""``specblockd bench simulate``: the decision rule and its alternatives against modelled drifting traffic."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from specblock.bandit.simulation.calibration import Calibration, calibration
from specblock.bandit.simulation.catalogue import COST_AWARE, Settings, policies, simulate
from specblock.bandit.simulation.curves import Curves, demo_curves, read_curves
from specblock.bandit.simulation.run import Outcome
from specblock.bandit.simulation.scenario import SCENARIOS, Scenario, scenario_named
from specblock.bandit.simulation.table import MIN_GAIN, lines, rows
from specblock.daemon.cli_replay import rule
from specblock.daemon.config_loader import load_config
from specblock.daemon.errors import ConfigError, ExitCode

Show = Callable[[str], None]
Run = tuple[Scenario, str, int, Settings]
"""Scenario, policy, seed, and the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateSettings:
    """What to simulate.

    Attributes:
        config: policy file of the decision rule.
        scenarios: names; empty: all.
        seeds: runs of each scenario, seeds 0, 1, ...
        curves: JSON with fitted numbers; None: those of the demo models.
        hours: simulated length of a run.
        jobs: processes that share the runs; what comes out does not depend on it.
    """

    config: Path
    scenarios: tuple[str, ...] = ()
    seeds: int = 1
    curves: Path | None = None
    hours: float = 2.0
    jobs: int = 1


def run(settings: SimulateSettings, as_json: bool, show: Show) -> int:
    """Simulates every policy in every scenario and shows the table.

    Raises:
        ConfigError: the policy, the curves or a scenario's name is wrong.
    """
    config = load_config(settings.config)
    try:
        scenarios = tuple(scenario_named(name) for name in settings.scenarios) or SCENARIOS
        curves = _curves(settings.curves)
        chosen = Settings(policy=rule(config), curves=curves, duration_s=settings.hours * 3600.0)
        names = tuple(policies(chosen))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    runs = [(s, name, seed, chosen) for s in scenarios for seed in range(settings.seeds) for name in names]
    outcomes = _all(runs, settings.jobs, show)
    table = rows(outcomes)
    found = calibration([z for outcome in outcomes if outcome.policy == COST_AWARE for z in outcome.surprises])
    if as_json:
        plain = {
            "modelled": True,
            "config": str(settings.config),
            "duration_s": chosen.duration_s,
            "rate_per_s": chosen.rate_per_s,
            "curves": asdict(curves),
            "calibration": None if found is None else asdict(found),
            "rows": [asdict(row) for row in table],
            "outcomes": [asdict(outcome) for outcome in outcomes],
        }
        show(json.dumps(plain, indent=2))
        return ExitCode.OK
    for line in lines(table):
        show(line)
    show("")
    source = settings.curves or "the runs of the demo models that README.md describes (origins: --json)"
    show(
        f"All numbers are modelled: {chosen.duration_s:.0f} s of {chosen.rate_per_s:g} requests per second, "
        f"{settings.seeds} seed{'' if settings.seeds == 1 else 's'}, rule of {settings.config}, curves of {source}."
    )
    show(
        "net counts every cost; regret is what is lost of the oracle's net, which knows the future and pays no trials; "
        "saved is against never, with its standard error; missed is the share of the oracle's saving that is not had, "
        f"where that saving exceeds {MIN_GAIN:.0%}."
    )
    show(calibration_line(found))
    return ExitCode.OK


def calibration_line(found: Calibration | None) -> str:
    """How often the measured gain lay within the interval that had been stated."""
    if found is None:
        return "calibration: no update was trained to its end, so there is nothing to compare."
    return (
        f"calibration: {found.covered:.0%} of {found.pairs} gains measured at the gate lay within the "
        f"{found.stated:.0%} interval predicted after the trial (mean deviation {found.bias:+.2f} standard deviations)."
    )


def _all(runs: Sequence[Run], jobs: int, show: Show) -> list[Outcome]:
    """Every run, in the order given; each scenario is named when its first run begins, or all at once."""
    if jobs == 1:
        found = []
        for number, run_ in enumerate(runs):
            if number == 0 or run_[0] != runs[number - 1][0]:
                show(f"{run_[0].name}: {run_[0].about}")
            found.append(_one(run_))
        return found
    for scenario in dict.fromkeys(run_[0] for run_ in runs):
        show(f"{scenario.name}: {scenario.about}")
    # A fresh interpreter each: forking would copy the threads' locks that numpy's libraries hold.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_one, runs))


def _one(run_: Run) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="specblock-simulate-") as directory:
        return simulate(*run_, Path(directory))


def _curves(path: Path | None) -> Curves:
    """The demo's curves, or those of a file.

    Raises:
        ValueError: it cannot be read or used.
    """
    if path is None:
        return demo_curves()
    try:
        return read_curves(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None

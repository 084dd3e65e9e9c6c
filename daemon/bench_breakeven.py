"""``specblockd bench breakeven``: for how long must a kind of text stay until an update of the drafter pays?

Every arm of the policy is trained, judged, stored and swapped in on every kind of text by the daemon's own code; then
the decision rule is asked, with these measurements as its forecast, from which expected regime on it would train.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from specblock.bandit.config import PolicyConfig
from specblock.daemon.bench_breakeven_measure import Measured, Served
from specblock.daemon.bench_breakeven_measure import run as measure
from specblock.daemon.bench_breakeven_stage import Sizes, adaptable
from specblock.daemon.breakeven import BreakEvenRow, Traffic, Update, make_row
from specblock.daemon.breakeven_ladder import (
    LADDER_S,
    ArmRung,
    Rung,
    Situation,
    arm_rung,
    cost_of,
    rung,
    trains_from_s,
)
from specblock.daemon.breakeven_words import lines
from specblock.daemon.cli_replay import rule
from specblock.daemon.facts import facts

SMALL = {"conversations": 32, "heldout": 16, "tokens": 32}
"""Ends within 15 minutes on two slow cores."""
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEvenSettings:
    """What to measure; ``out`` is the directory for the JSON and the page, None writes neither."""

    config: Path
    sizes: Sizes
    out: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Everything the command found; ``trains_from_s`` goes with ``rows``."""

    rows: tuple[BreakEvenRow, ...]
    trains_from_s: tuple[float | None, ...]
    arm_rungs: tuple[ArmRung, ...]
    rungs: tuple[Rung, ...]


def run(settings: BreakEvenSettings, as_json: bool, say: Say) -> int:
    """Measures and prints; returns the exit code.

    Raises:
        ConfigError: there is nothing to adapt.
        DependencyError: a file of prompts is missing.
    """
    config = adaptable(settings.config, settings.sizes)
    sizes = settings.sizes
    policy = rule(config)
    torch.set_num_threads(config.trainer.threads)
    # Before measuring: what ran is the code of now, whatever is committed meanwhile.
    known = _facts(settings, config.target.dtype, config.target.device)
    measured = measure(config, policy, sizes, say)
    found = findings(measured, policy, sizes.seed)
    result = as_plain(found, measured, known)
    if settings.out is not None:
        from specblock.daemon.breakeven_report import write_page

        settings.out.mkdir(parents=True, exist_ok=True)
        (settings.out / "breakeven.json").write_text(json.dumps(result, indent=2) + "\n")
        say(f"page: {write_page(settings.out / 'breakeven.html', result)}")
    for line in [json.dumps(result, indent=2)] if as_json else lines(result):
        say(line)
    return 0


def findings(measured: Measured, policy: PolicyConfig, seed: int) -> Findings:
    """Rows, and what the rule makes of them; ``seed`` is the bootstrap's."""
    served, rows, starts, arm_rungs, rungs = measured.served, [], [], [], []
    for domain in served.acceptance:
        situation = _situation(domain, served)
        own = [update for update in measured.updates if update.domain == domain]
        traffic = Traffic(s_per_token=situation.s_per_token, tokens_per_request=served.tokens_per_request[domain])
        for update in own:
            rows.append(make_row(update, traffic, cost_of(situation, update, policy), policy.gate, seed))
            starts.append(trains_from_s(situation, update, policy))
            arm_rungs += [arm_rung(situation, update, policy, regime_s) for regime_s in LADDER_S]
        rungs += [rung(situation, own, policy, regime_s) for regime_s in LADDER_S]
    return Findings(rows=tuple(rows), trains_from_s=tuple(starts), arm_rungs=tuple(arm_rungs), rungs=tuple(rungs))


def _situation(domain: str, served: Served) -> Situation:
    # As in the daemon: a kind of text is expected to reach what the version reaches on the others, or its own best.
    acceptance = served.acceptance[domain]
    return Situation(
        domain=domain,
        version=served.version,
        acceptance=acceptance,
        reference=max(served.acceptance.values()),
        s_per_token=served.cycle_s / acceptance,
        cycles=served.cycles[domain],
        num_train=served.num_train[domain],
        num_heldout=served.num_heldout[domain],
        parity=served.parity,
    )


def _facts(settings: BreakEvenSettings, dtype: str, device: str) -> dict[str, Any]:
    return dict(
        facts(
            device,
            dtype=dtype,
            config=str(settings.config),
            **settings.sizes.facts(),
        )
    )


def as_plain(found: Findings, measured: Measured, known: dict[str, Any]) -> dict[str, Any]:
    """The JSON object: ``facts``, ``served``, ``rows``, ``arm_rungs``, ``rungs`` and the replayed ``conversations``."""
    starts = zip(found.rows, found.trains_from_s, strict=True)
    return {
        "facts": known,
        "served": asdict(measured.served),
        "rows": [asdict(row) | {"rule_trains_from_s": start} for row, start in starts],
        "arm_rungs": [asdict(one) for one in found.arm_rungs],
        "rungs": [asdict(one) for one in found.rungs],
        "conversations": [_replayed(update) for update in measured.updates],
    }


def _replayed(update: Update) -> dict[str, Any]:
    """Per kind of text and conversation: tokens, and cycles before, after the trial and after the update."""
    cycles: dict[str, list[str]] = {}
    for trial, final in zip(update.trial.rows, update.final.rows, strict=True):
        numbers = (final.tokens, final.cycles_old, trial.cycles_new, final.cycles_new)
        cycles.setdefault(final.domain, []).append(" ".join(map(str, numbers)))
    return {"domain": update.domain, "arm": update.arm, "tokens_old_trial_new": cycles}

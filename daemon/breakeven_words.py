"""The break-even table and the rule's ladder as lines for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from specblock.bandit.decision import ABANDON, PROBE

TRAIN, TRIAL_ONLY = "train", "trial only"


def lines(result: dict[str, Any]) -> Iterator[str]:
    """What ``bench breakeven --json`` prints, for people."""
    served = result["served"]
    yield json.dumps(result["facts"])
    yield (
        f"one request's cycle: {1e3 * served['cycle_s']:.2f} ms by the cost curve, {1e3 * served['live_cycle_s']:.2f} "
        f"ms as accounted live; parity {served['parity']['verdict']} ({served['parity']['difference']:+.2%})"
    )
    yield ""
    yield (
        f"{'domain':<12}{'arm':<6}{'accept':<15}{'saves (95 %)':<27}{'train s':>8}{'score s':>8}{'stall ms':>9}"
        f"{'cost s':>8}  {'pays after s (95 %)':<27}{'requests':>9}{'tokens':>9}  {'rule from':<10}{'gate'}"
    )
    for row in result["rows"]:
        low, high = row["saving_interval"]
        saves = f"{row['saving']:+.1%} [{low:+.1%}, {high:+.1%}]"
        first, last = (span(s) for s in row["break_even_interval_s"])
        pays = f"{span(row['break_even_s'])} [{first}, {last}]"
        accept = f"{row['acceptance_old']:.2f} -> {row['acceptance_new']:.2f}"
        yield (
            f"{row['domain']:<12}{row['arm']:<6}{accept:<15}{saves:<27}{row['train_s']:>8.1f}{row['score_s']:>8.1f}"
            f"{1e3 * row['stall_s']:>9.1f}{row['cost_s']:>8.1f}  {pays:<27}{count(row['requests']):>9}"
            f"{count(row['tokens']):>9}  {span(row['rule_trains_from_s']):<10}{row['gate']}"
        )
    yield ""
    yield "What the rule decides, told what was measured, for an expected time until traffic changes (net device-s):"
    regimes = list(dict.fromkeys(one["regime_s"] for one in result["rungs"]))
    yield f"{'domain':<12}{'arm':<8}" + "".join(f"{span(s):>20}" for s in regimes)
    keys = dict.fromkeys((one["domain"], one["arm"]) for one in result["arm_rungs"])
    for domain in dict.fromkeys(domain for domain, _ in keys):
        for arm in (arm for owner, arm in keys if owner == domain):
            own = [one for one in result["arm_rungs"] if (one["domain"], one["arm"]) == (domain, arm)]
            yield f"{domain:<12}{arm:<8}" + "".join(f"{_rung(one):>20}" for one in own)
        both = [one for one in result["rungs"] if one["domain"] == domain]
        yield f"{domain:<12}{'choice':<8}" + "".join(f"{_choice(one['action'], one['arm']):>20}" for one in both)
        guess = [_choice(one["guessed_action"], one["guessed_arm"]) for one in both]
        yield f"{domain:<12}{'guess':<8}" + "".join(f"{text:>20}" for text in guess)
    yield (
        "choice: between all arms; guess: the same with the policy's first guesses instead of the measurement. trial "
        "only: the update would be abandoned after its trial."
    )


def span(seconds: float | None) -> str:
    """A length of time in its natural unit."""
    if seconds is None:
        return "never"
    units: Sequence[tuple[str, float]] = (("d", 86_400.0), ("h", 3600.0), ("min", 60.0))
    return next((f"{seconds / size:.3g} {unit}" for unit, size in units if seconds >= size), f"{seconds:.3g} s")


def count(value: float | None) -> str:
    """A number of requests or tokens."""
    return "never" if value is None else f"{value:.0f}"


def verb(one: dict[str, Any]) -> str:
    """What a rung's action comes to."""
    if one["action"] != PROBE:
        return str(one["action"])
    return TRIAL_ONLY if one.get("after_trial") == ABANDON else TRAIN


def _rung(one: dict[str, Any]) -> str:
    return f"{verb(one)} {one['net_s']:+.0f}"


def _choice(action: str, arm: str) -> str:
    return f"{verb({'action': action})} {arm}".strip()

"""May a candidate serve? Paired replay of old and new on identical conversations, tested at any time.

Per conversation d = (cycles_old t_old - cycles_new t_new) / tokens, in units of the old version's cost per token and
clipped to +-``clip``. A betting confidence sequence for the mean of the clipped d may be looked at after every
conversation: the probability that a candidate whose mean clipped saving is at most 0 ever passes is at most ``alpha``.
What clipping hides (a few conversations that become much slower) the rule that no domain may lose catches: it uses the
plain costs.

Source: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting (JRSS-B 2024), approximate
GRAPA bets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from specblock.bandit.actions import CompareReport, PairedReplay
from specblock.bandit.config import GateConfig
from specblock.bandit.intervals import RatioSums, one_sided_z, ratio_of

GateVerdict = Literal["pass", "fail", "undecided"]
Floats = NDArray[np.float64]

GRID = 401
"""Means tested; odd, so that "no saving" is exactly one of them."""
FIRST_SD = 0.15
"""Scatter of the units that the first bets assume. Any value keeps the error below ``alpha``; one near what drafters
show (0.09) wins its evidence in a third of the conversations that the widest possible scatter would take."""
SHOWN_Z, DOUBT_Z = one_sided_z(0.95), one_sided_z(0.8)
"""Standard errors by which a domain's loss must be above ``max_domain_loss`` to end it, and below it to pass."""
MAX_BET = 0.75
"""Share of the wealth that one conversation may cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRow:
    """One conversation's cost with both versions, in device-seconds."""

    conversation_id: str
    domain: str
    time_s: float
    tokens: int
    cost_old_s: float
    cost_new_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSaving:
    """Pooled relative saving of one domain, 1 - cost_new / cost_old, with its standard error."""

    domain: str
    conversations: int
    saving: float
    se: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """Pooled saving of all conversations and of each domain."""

    conversations: int
    relative: float
    se: float
    s_per_token: float
    domains: tuple[DomainSaving, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateEvidence:
    """The outcome of one look.

    Attributes:
        mean, lower, upper: clipped relative saving and its confidence sequence; lower > 0 passes.
        saving: plain pooled savings.
    """

    verdict: str
    reason: str
    conversations: int
    mean: float
    lower: float
    upper: float
    saving: Saving


def gate_rows(report: CompareReport) -> list[GateRow]:
    """Costs of the report's usable conversations, in the order of their arrival."""
    used = [row for row in report.rows if row.tokens > 0 and row.cycles_old > 0 and row.cycles_new > 0]
    return [_cost(row, report) for row in sorted(used, key=lambda row: (row.time_s, row.conversation_id))]


def _cost(row: PairedReplay, report: CompareReport) -> GateRow:
    return GateRow(
        conversation_id=row.conversation_id,
        domain=row.domain,
        time_s=row.time_s,
        tokens=row.tokens,
        cost_old_s=row.cycles_old * report.cycle_s_old,
        cost_new_s=row.cycles_new * report.cycle_s_new,
    )


def pooled_saving(rows: Sequence[GateRow]) -> Saving:
    """Plain pooled savings, paired by conversation."""
    costs = ratio_of((row.cost_old_s, row.cost_new_s) for row in rows)
    tokens = sum(row.tokens for row in rows)
    by_domain = {domain: [row for row in rows if row.domain == domain] for domain in sorted({r.domain for r in rows})}
    return Saving(
        conversations=len(rows),
        relative=_relative(costs),
        se=costs.se,
        s_per_token=(costs.x - costs.y) / tokens if tokens else 0.0,
        domains=tuple(_domain_saving(domain, group) for domain, group in by_domain.items()),
    )


def reversed_saving(saving: Saving) -> Saving:
    """What the old version saves against the new one, to first order in the errors."""
    domains = tuple(
        replace(d, saving=1 - 1 / (1 - d.saving), se=d.se / (1 - d.saving) ** 2) for d in saving.domains if d.saving < 1
    )
    kept = 1 - saving.relative
    return replace(
        saving, relative=1 - 1 / kept, se=saving.se / kept**2, s_per_token=-saving.s_per_token, domains=domains
    )


def _domain_saving(domain: str, rows: Sequence[GateRow]) -> DomainSaving:
    costs = ratio_of((row.cost_old_s, row.cost_new_s) for row in rows)
    return DomainSaving(domain=domain, conversations=len(rows), saving=_relative(costs), se=costs.se)


def _relative(costs: RatioSums) -> float:
    """Saving of pairs (cost_old, cost_new); costs of nothing (no row, no cycle timed yet) save nothing."""
    return 1 - costs.ratio if costs.x > 0 else 0.0


def judge(rows: Sequence[GateRow], scale_s: float, config: GateConfig) -> GateEvidence:
    """One look at the evidence so far.

    Args:
        rows: all conversations so far; a later look must extend, never reorder, an earlier one's.
        scale_s: the old version's device-seconds per token, fixed before the first look.
        config: error, clip and limits.
    """
    units = clipped_units(rows, scale_s, config.clip)
    lower = lower_bound(units, config.alpha)
    upper = 1 - lower_bound(1 - units, config.alpha)
    low, high = ((2 * bound - 1) * config.clip for bound in (lower, upper))
    saving = pooled_saving(rows)
    verdict, reason = _verdict(len(rows), low, high, saving.domains, config)
    return GateEvidence(
        verdict=verdict,
        reason=reason,
        conversations=len(rows),
        mean=float((2 * units.mean() - 1) * config.clip) if len(rows) else 0.0,
        lower=low,
        upper=high,
        saving=saving,
    )


def _verdict(
    count: int, low: float, high: float, domains: Iterable[DomainSaving], config: GateConfig
) -> tuple[GateVerdict, str]:
    loses = doubt = ""
    for domain in domains:
        if domain.conversations < config.domain_min_conversations:
            continue
        loss, words = -domain.saving, f"cost {-domain.saving:.1%} more per token in domain {domain.domain}"
        if loss - SHOWN_Z * domain.se > config.max_domain_loss:
            return "fail", f"it would {words}"
        # A dozen conversations may look bad by chance, or good: until they say which, others are looked at.
        loses = f"it may {words}" if loss > config.max_domain_loss else loses
        doubt = f"it may {words}" if loss + DOUBT_Z * domain.se > config.max_domain_loss else doubt
    last = count >= config.max_conversations
    if high < 0:
        return "fail", f"the candidate is slower: saving at most {high:.1%}"
    if low > 0 and count >= config.min_conversations and not (loses if last else doubt):
        return "pass", f"saves at least {low:.1%} of the device-seconds per token"
    if last:
        return "fail", loses or f"no saving shown in {count} conversations (at least {low:.1%}, at most {high:.1%})"
    reason = f"{count} conversations leave the saving between {low:.1%} and {high:.1%}"
    return "undecided", f"{reason}; {doubt}" if doubt and low > 0 else reason


def clipped_units(rows: Sequence[GateRow], scale_s: float, clip: float) -> Floats:
    """float64 [n] in [0, 1]: the clipped relative saving of each conversation, 1/2 meaning none."""
    saved = [(row.cost_old_s - row.cost_new_s) / row.tokens / scale_s for row in rows]
    return (np.clip(np.asarray(saved, dtype=np.float64), -clip, clip) + clip) / (2 * clip)


def lower_bound(units: Floats, alpha: float) -> float:
    """Lower confidence sequence, at the last of ``units``, of the mean of values in [0, 1]; 0 without evidence.

    For every mean m a gambler who may only bet on "larger than m" plays a game that is unfavourable if the mean is at
    most m; the means at which the wealth ever reached 1 / alpha are refused.
    """
    mean_M = np.linspace(0.0, 1.0, GRID)[1:-1]
    wealth_M, best_M = np.zeros_like(mean_M), np.zeros_like(mean_M)
    total, squares = 0.5, FIRST_SD**2
    for seen, unit in enumerate(units, start=1):
        guess, variance = total / seen, squares / seen
        edge_M = guess - mean_M
        bet_M = np.clip(edge_M / (variance + edge_M**2), 0.0, MAX_BET / mean_M)
        wealth_M += np.log1p(bet_M * (unit - mean_M))
        np.maximum(best_M, wealth_M, out=best_M)
        total += float(unit)
        squares += float(unit - total / (seen + 1)) ** 2
    refused_M = best_M >= math.log(1 / alpha)
    leading = int(np.argmin(refused_M)) if not refused_M.all() else len(refused_M)
    return float(mean_M[leading - 1]) if leading else 0.0

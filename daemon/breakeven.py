"""When an update pays: gain, cost and the phase length at which they meet. Pure arithmetic on measured reports.

An update costs C device-seconds once and saves the share g of the serving device-seconds afterwards, so a phase that
goes on for T serving device-seconds from the swap on is worth ``g T - C``; it breaks even at ``C / g``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specblock.bandit.actions import CompareReport, TrainReport
from specblock.bandit.config import GateConfig, HorizonConfig
from specblock.bandit.cost import break_even_s
from specblock.bandit.gate import Floats, GateRow, Saving, gate_rows, judge, pooled_saving
from specblock.daemon.resampling import Interval, interval_95, resampled

SCORED_CONVERSATIONS = 16
"""Conversations of the comparison whose seconds are told to the rule, as many as its own first guess is about. More are
measured here only for a narrower interval, which no operator would pay for."""
_RESAMPLES = 4000
_FOR_EVER = HorizonConfig(cap_s=1e12)
OpenInterval = tuple[float | None, float | None]
"""None: never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One complete update of one arm for one kind of text, as measured.

    Attributes:
        domain: the kind of text it was made for.
        probe, rest: the trial's steps and the remaining ones.
        trial, final: paired replay after the trial and of the complete update, on all kinds of text.
        stall_s: serving stall of the swap.
        publish_s: trainer seconds for storing the version and getting its weights ready to travel; the daemon does
            not charge them.
        accepted: acceptance length on the held-out conversations of ``domain``, before and after.
        served_as_judged: share of those conversations on which the version that was stored and swapped in needs the
            same cycles as the candidate that was judged.
    """

    domain: str
    arm: str
    probe: TrainReport
    rest: TrainReport
    trial: CompareReport
    final: CompareReport
    stall_s: float
    publish_s: float
    accepted: tuple[float, float]
    served_as_judged: float

    @property
    def train_s(self) -> float:
        """Seconds of all steps."""
        return self.probe.train_s + self.rest.train_s

    @property
    def score_s(self) -> float:
        """Device-seconds of a paired replay of ``SCORED_CONVERSATIONS``."""
        replayed = len(self.trial.rows) + len(self.final.rows)
        return SCORED_CONVERSATIONS * (self.trial.device_s + self.final.device_s) / max(1, replayed)

    def saving(self, *, trial: bool = False) -> Saving:
        """What the complete update (or its trial) saves on its own kind of text."""
        return pooled_saving(own_rows(self.trial if trial else self.final, self.domain))


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What serving one kind of text costs before any update: device-seconds per token and tokens per request."""

    s_per_token: float
    tokens_per_request: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEvenRow:
    """One line of the table; times are serving device-seconds from the swap on, None means never.

    Attributes:
        saving: relative saving of device-seconds per token on held-out conversations of the domain.
        saving_interval: 95 %, bootstrapped over conversations; so are the intervals of the break-even.
        loses: share of the bootstrap's draws in which nothing is saved.
        trial_saving: the same after the trial's steps.
        others: saving (negative: loss) on the other kinds of text.
        gate: verdict of the daemon's gate on the domain's held-out conversations.
        score_s: one paired replay of ``SCORED_CONVERSATIONS``.
        cost_s: everything the rule charges an update with: training, scoring, stall, price and interference.
        tokens, requests: of serving at the old speed for ``break_even_s``.
    """

    domain: str
    arm: str
    conversations: int
    acceptance_old: float
    acceptance_new: float
    saving: float
    saving_interval: Interval
    loses: float
    trial_saving: float
    others: dict[str, float]
    gate: str
    gate_reason: str
    s_per_token_old: float
    s_per_token_new: float
    positions: int
    train_s: float
    score_s: float
    stall_s: float
    publish_s: float
    served_as_judged: float
    cost_s: float
    break_even_s: float | None
    break_even_interval_s: OpenInterval
    tokens: float | None
    requests: float | None
    requests_interval: OpenInterval


def own_rows(report: CompareReport, domain: str) -> list[GateRow]:
    """A report's conversations of one kind of text, costed as the gate does."""
    return [row for row in gate_rows(report) if row.domain == domain]


def saving_draws(rows: Sequence[GateRow], seed: int) -> Floats:
    """Relative savings of resampled conversations; a conversation keeps its two costs together."""
    costs = np.array([(row.cost_old_s, row.cost_new_s) for row in rows], dtype=np.float64)
    sums = costs[resampled(len(rows), _RESAMPLES, seed)].sum(axis=1)
    draws: Floats = 1 - sums[:, 1] / sums[:, 0]
    return draws


def break_even(gain: float, cost_s: float) -> float | None:
    """Serving device-seconds until a saving of the share ``gain`` has paid ``cost_s``; None: never."""
    return break_even_s(gain, cost_s, 0.0, _FOR_EVER)


def break_even_interval(draws: Floats, cost_s: float) -> OpenInterval:
    """95 % interval: the best gain gives its lower end; an upper end of None may never come."""
    low, high = interval_95(draws)
    return break_even(high, cost_s), break_even(low, cost_s)


def net_s(gain: float, cost_s: float, phase_s: float) -> float:
    """Device-seconds won by a phase of that length (lost if negative)."""
    return gain * phase_s - cost_s


def make_row(update: Update, traffic: Traffic, cost_s: float, gate: GateConfig, seed: int) -> BreakEvenRow:
    """The line of one update; ``cost_s`` is all that it is charged, by the decision rule's own account.

    Raises:
        ValueError: no usable held-out conversation of its kind of text.
    """
    rows = own_rows(update.final, update.domain)
    if not rows:
        raise ValueError(f"no held-out conversation of {update.domain} could be replayed")
    saving, draws = update.saving(), saving_draws(rows, seed)
    verdict = judge(rows, traffic.s_per_token, gate)
    point, interval = break_even(saving.relative, cost_s), break_even_interval(draws, cost_s)
    every = pooled_saving(gate_rows(update.final)).domains
    return BreakEvenRow(
        domain=update.domain,
        arm=update.arm,
        conversations=len(rows),
        acceptance_old=update.accepted[0],
        acceptance_new=update.accepted[1],
        saving=saving.relative,
        saving_interval=interval_95(draws),
        loses=float(np.mean(draws <= 0)),
        trial_saving=update.saving(trial=True).relative,
        others={d.domain: d.saving for d in every if d.domain != update.domain},
        gate=verdict.verdict,
        gate_reason=verdict.reason,
        s_per_token_old=traffic.s_per_token,
        s_per_token_new=traffic.s_per_token * (1 - saving.relative),
        positions=update.probe.positions + update.rest.positions,
        train_s=update.train_s,
        score_s=update.score_s,
        stall_s=update.stall_s,
        publish_s=update.publish_s,
        served_as_judged=update.served_as_judged,
        cost_s=cost_s,
        break_even_s=point,
        break_even_interval_s=interval,
        tokens=_each(point, traffic.s_per_token),
        requests=_each(point, traffic.s_per_token * traffic.tokens_per_request),
        requests_interval=(
            _each(interval[0], traffic.s_per_token * traffic.tokens_per_request),
            _each(interval[1], traffic.s_per_token * traffic.tokens_per_request),
        ),
    )


def _each(seconds: float | None, unit_s: float) -> float | None:
    return None if seconds is None or not math.isfinite(seconds) else seconds / unit_s

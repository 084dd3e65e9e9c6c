"""How well stated intervals hold: predicted gains of complete updates beside what the gate then measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from specblock.bandit.cost import NetValue
from specblock.bandit.intervals import two_sided_z
from specblock.bandit.ledger import LedgerRecord
from specblock.bandit.replay import PROBED

STATED = 0.8
"""Confidence of the intervals that are checked."""

MIN_CONVERSATIONS = 8
"""Gate conversations of a domain without which a measurement says nothing: a few may agree by chance, and then seem
exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Coverage of the stated intervals.

    Attributes:
        stated: confidence they claim.
        covered: share of measured gains within them.
        pairs: predicted and measured gains, one per update and domain.
        bias: mean of (measured - predicted) in the interval's standard deviations; above 0: too careful.
    """

    stated: float
    covered: float
    pairs: int
    bias: float


def surprises(records: Iterable[LedgerRecord]) -> tuple[float, ...]:
    """(measured - predicted) / standard deviation of every complete update that the gate looked at, per domain.

    The prediction is the one after the trial; the measurement is the gate's newest, whether it passed or not, so that
    bad updates count as well. Its own error is part of the deviation.
    """
    predicted: dict[str, NetValue] = {}
    measured: dict[str, dict[str, float]] = {}
    for record in records:
        option = record.option()
        if record.stage == PROBED and option is not None:
            predicted[record.decision_id] = option.value
        elif record.stage.startswith("gated-"):
            measured[record.decision_id] = record.numbers
    return tuple(
        (numbers[f"saving.{domain.domain}"] - domain.mean) / math.hypot(domain.sd, error)
        for key, numbers in sorted(measured.items())
        if key in predicted
        for domain in predicted[key].domains
        if numbers.get(f"conversations.{domain.domain}", 0.0) >= MIN_CONVERSATIONS
        if (error := numbers[f"saving_se.{domain.domain}"]) < 1.0
    )


def calibration(found: Sequence[float]) -> Calibration | None:
    """Coverage of the stated intervals; None without any pair."""
    if not found:
        return None
    half = two_sided_z(STATED)
    covered = sum(abs(z) <= half for z in found) / len(found)
    return Calibration(stated=STATED, covered=covered, pairs=len(found), bias=math.fsum(found) / len(found))

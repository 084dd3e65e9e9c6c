"""Coverage of stated intervals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from specblock.bandit.cost import DomainGain
from specblock.bandit.decision import Option
from specblock.bandit.forecast import complete_value
from specblock.bandit.ledger import LedgerRecord
from specblock.bandit.simulation.calibration import calibration, surprises
from tests.bandit.test_policy import CONFIG, CONTEXT, HEAD, checked

PREDICTED = replace(
    complete_value(HEAD, CONTEXT, checked(), CONFIG),
    domains=(DomainGain(domain="python", share=1.0, mean=0.1, sd=0.03),),
)


def record(stage: str, number: int = 0, **numbers: float) -> LedgerRecord:
    options = (Option(value=PREDICTED),) if stage == "probed" else ()
    return LedgerRecord(
        decision_id=f"d{number:06d}",
        stage=stage,
        time_s=1.0,
        action="probe",
        arm="head",
        options=options,
        numbers=numbers,
    )


def gated(saved: float, conversations: float = 40.0, error: float = 0.04) -> dict[str, float]:
    return {"saving.python": saved, "saving_se.python": error, "conversations.python": conversations}


def test_the_newest_look_counts_with_its_own_error() -> None:
    found = surprises([record("probed"), record("gated-1", **gated(0.5)), record("gated-2", **gated(0.2))])
    assert found == (pytest.approx(0.1 / 0.05),)


def test_updates_that_never_came_so_far_say_nothing() -> None:
    assert surprises([record("probed"), record("abandoned")]) == ()
    assert surprises([record("probed"), record("gated-1", **gated(0.2, conversations=3.0))]) == ()
    assert calibration(()) is None


def test_coverage_of_honest_intervals_is_what_they_state() -> None:
    honest = calibration(np.random.default_rng(0).standard_normal(20_000).tolist())
    assert honest is not None and honest.covered == pytest.approx(honest.stated, abs=0.01)
    assert honest.pairs == 20_000 and abs(honest.bias) < 0.03

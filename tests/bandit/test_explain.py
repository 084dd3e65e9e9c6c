"""Every kind of record in plain words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specblock.bandit.config import PolicyConfig
from specblock.bandit.explain import explain
from specblock.bandit.ledger import TERMINAL, LedgerRecord
from specblock.bandit.policy import decide
from tests.bandit.test_policy import CONTEXT, at, checked

STAGES = (
    *("probing", "scoring", "probed", "training", "trained", "gating-2", "gated-2", "promoting", "promoted"),
    *("verifying", "verified", "settling", "rolling_back", *sorted(TERMINAL)),
)


def decided(domain_drop: float) -> LedgerRecord:
    decision, _ = decide(at(drop=domain_drop, raw_drop=domain_drop), checked(), PolicyConfig())
    return LedgerRecord(
        decision_id="d000017",
        stage="decided",
        time_s=1.0,
        action=decision.action,
        arm=decision.arm,
        verdict=decision.verdict,
        reason=decision.reason,
        base_version="v1",
        candidate_version="v2",
        options=decision.options,
        context=CONTEXT,
    )


def test_a_probe_names_the_arm_the_drop_and_every_term() -> None:
    words = explain(decided(0.3))
    for part in ("d000017: Trying", "30% below its reference", "device-seconds", "training", "scoring", "paid back"):
        assert part in words, words


def test_a_skip_names_what_the_best_arm_would_have_cost() -> None:
    words = explain(decided(0.0))
    assert words.startswith("d000017: No update: acceptance is at its reference") and "in all" in words


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_words_of_its_own_and_its_charge(stage: str) -> None:
    record = replace(decided(0.3), stage=stage, reason="because of this", charged_s=1.25)
    words = explain(record)
    assert words.startswith("d000017: ") and "because of this." in words
    assert words.endswith("Charged 1.25 device-seconds.")
    assert not words.removeprefix("d000017: ").startswith(stage.partition("-")[0] + " "), "not just the stage's name"


def test_a_trial_by_chance_says_so() -> None:
    words = explain(replace(decided(0.3), probability=0.004))
    assert words.startswith("d000017: By chance (0.4%) trying full on v1")

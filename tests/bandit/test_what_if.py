"""A recorded ledger under its own rule and under another one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from specblock.bandit.config import Arm, HorizonConfig, PolicyConfig
from specblock.bandit.ledger import LedgerRecord, read_ledger
from specblock.bandit.replay import reproductions
from specblock.bandit.what_if import WhatIf, what_if
from tests.bandit.test_service import records, shifted
from tests.bandit.world import small_policy


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the real service with one complete update in it."""
    path = tmp_path_factory.mktemp("run")
    shifted(path, steps=90)
    return path


def under(directory: Path, policy: PolicyConfig) -> WhatIf:
    def read() -> Iterator[LedgerRecord]:
        return read_ledger(directory / "ledger.jsonl")

    return what_if(read, policy)


def test_every_decision_is_reproduced_bit_for_bit(directory: Path) -> None:
    taken = list(reproductions(records(directory), small_policy()))
    assert len(taken) > 10 and all(one.reproduced and not one.why for one in taken)
    assert {one.stage for one in taken} == {"decided", "probed"}


def test_other_numbers_are_told_from_decisions_that_came_out_differently(directory: Path) -> None:
    taken = list(reproductions(records(directory), small_policy(confidence=0.6)))
    assert not any(one.reproduced for one in taken) and all("fingerprint" in one.why for one in taken)
    altered = [replace(r, reason="because") if r.decision_id == "d000002" else r for r in records(directory)]
    wrong = [one for one in reproductions(altered, small_policy()) if not one.reproduced]
    assert [(one.decision_id, one.why) for one in wrong] == [("d000002", "reason came out differently")]


def test_inputs_that_were_changed_or_are_missing_are_not_called_reproduced(directory: Path) -> None:
    first = records(directory)[0]
    assert first.context is not None
    busier = replace(first, context=replace(first.context, busy_devices=0.9))
    assert "inputs were changed" in next(reproductions([busier], small_policy())).why
    for lost in (replace(first, context=None), replace(first, policy_state=None)):
        assert next(reproductions([lost], small_policy())).why == "its inputs are not in the ledger"
    arms = (Arm(name="skip"), Arm(name="other", patterns=("*",), steps=1, learning_rate=1e-3))
    unknown = [one for one in reproductions(records(directory), small_policy(arms=arms)) if one.stage == "probed"]
    assert "no arm 'head'" in unknown[0].why


def test_the_same_rule_gives_the_recorded_balance(directory: Path) -> None:
    found = under(directory, small_policy())
    assert found.differences == () and found.without_inputs == 0 and found.decisions > 10
    assert found.modelled.charged_s == pytest.approx(found.recorded.charged_s)
    assert found.modelled.saved_s == pytest.approx(found.recorded.realised_s)
    assert found.modelled.kept >= 1 and found.modelled.dropped == found.modelled.added == 0


def test_a_rule_that_trusts_in_no_future_leaves_the_updates_out(directory: Path) -> None:
    found = under(directory, small_policy(horizon=HorizonConfig(cap_s=0.001)))
    first = next(d for d in found.differences if d.recorded == "probe head")
    assert first.other == "skip" and "expected to save" in first.other_why and first.recorded_why
    assert found.modelled.kept == 0 and found.modelled.dropped >= 1
    assert found.modelled.saved_s == 0.0 and 0 < found.modelled.charged_s < found.recorded.charged_s


def test_a_rule_without_the_arm_abandons_what_was_tried_with_it(directory: Path) -> None:
    arms = (Arm(name="skip"), Arm(name="other", patterns=("*",), steps=1, learning_rate=1e-3))
    found = under(directory, small_policy(arms=arms))
    probed = next(d for d in found.differences if d.stage == "probed")
    assert (probed.other, probed.other_why) == ("abandon head", "it has no arm head")


def test_what_only_the_other_rule_would_have_done_is_its_own_prediction_and_counted_once(tmp_path: Path) -> None:
    shortsighted = small_policy(horizon=HorizonConfig(cap_s=0.001))
    shifted(tmp_path, shortsighted, steps=60)
    found = under(tmp_path, small_policy())
    assert found.recorded.promoted == 0
    asked = [d for d in found.differences if d.other == "check_parity" and "update would pay" in d.other_why]
    assert len(asked) > 1, "it would have started at every one of them"
    assert found.modelled.added == 1 and found.modelled.predicted_saved_s > found.modelled.predicted_charged_s > 0


def test_decisions_without_inputs_are_counted() -> None:
    bare = LedgerRecord(decision_id="d000000", stage="decided", time_s=1.0, action="skip")
    found = what_if(lambda: [bare], small_policy())
    assert (found.decisions, found.without_inputs, found.differences) == (1, 1, ())

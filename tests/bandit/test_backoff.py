"""What an update that brought nothing does to the next: proof that it does not pay is more than failing to prove it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from specblock.bandit import stages_candidate
from specblock.bandit.backoff import cooldown_left_s
from specblock.bandit.config import PolicyConfig
from specblock.bandit.decision import ABANDON, PolicyState, Target
from specblock.bandit.learning import end_update
from specblock.bandit.policy import decide, may_pay
from tests.bandit.test_policy import CONFIG, HEAD, PARITY_OK, checked, probed
from tests.bandit.test_service import drive, make, records
from tests.bandit.world import DEAR_S, small_policy

COST_S, BUSY = 120.0, 0.8
PLAIN_S = COST_S / (CONFIG.waste_share * BUSY)
"""Wait until that cost is ``waste_share`` of serving."""


def ended(*decided: bool) -> PolicyState:
    """After updates without a gain, in a row."""
    state = PolicyState()
    for one in decided:
        state = end_update(state, HEAD, 10_000.0, 0.2, gained=False, decided=one, spent_s=COST_S)
    return state


def waiting_s(state: PolicyState) -> float:
    return cooldown_left_s(
        HEAD, 10_000.0, state, CONFIG, (Target(domain="python", share=1.0, drop=0.2, drop_se=0.0),), BUSY
    )


def test_undecided_updates_wait_off_what_they_cost_and_no_more() -> None:
    for count in range(1, 6):
        assert waiting_s(ended(*[False] * count)) == pytest.approx(PLAIN_S), "however many in a row"
    assert waiting_s(ended(True, True)) == pytest.approx(2 * PLAIN_S)


def test_an_undecided_update_takes_nothing_back_of_what_was_proven() -> None:
    assert waiting_s(ended(True, True, False)) == pytest.approx(2 * PLAIN_S)
    assert waiting_s(ended(False, True)) == pytest.approx(2 * PLAIN_S)


def test_a_trial_shows_that_an_arm_does_not_pay_only_if_the_upper_bound_says_so() -> None:
    vague, _ = decide(probed(-0.1, se=0.02), checked(), CONFIG)
    assert vague.action == ABANDON and may_pay(vague)
    telling = replace(CONFIG, arms=(CONFIG.arms[0], replace(HEAD, probe_gain_share=0.9, probe_gain_share_sd=0.01)))
    sharp, _ = decide(probed(-0.1, se=1e-3), checked(), telling)
    assert sharp.action == ABANDON and not may_pay(sharp)
    option = sharp.options[0].value
    assert option.net + (option.net - option.net_lower) <= 0
    broken, _ = decide(probed(-0.02, se=0.02), checked(replace(PARITY_OK, verdict="broken", difference=-0.3)), CONFIG)
    assert broken.action == ABANDON and not may_pay(broken), "a fault is waited off ever longer"


@pytest.mark.parametrize("pays", [True, False])
def test_abandoned_trials_double_the_wait_only_if_they_decided(
    pays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages_candidate, "may_pay", lambda decision: pays)
    state, stages = after_failures(tmp_path, nothing_to_win())
    assert stages.count("abandoned") >= 2
    assert state.training.in_row == (1 if pays else stages.count("abandoned"))


def test_candidates_that_the_gate_gives_up_do_not_double_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages_candidate, "_not_worth_looking_on", lambda *arguments: "given up")
    plain = impatient_policy()
    # So strict that the first look cannot pass anything.
    strict = replace(plain, gate=replace(plain.gate, alpha=1e-9))
    state, stages = after_failures(tmp_path, strict)
    assert stages.count("rejected") >= 2 and state.training.in_row == 1


def impatient_policy() -> PolicyConfig:
    """It soon tries again: little is waited, and what was learned of the arm fades at once."""
    plain = small_policy(waste_share=0.9, evidence_half_life_s=1.0)
    return replace(plain, arms=(plain.arm("skip"), replace(plain.arm("head"), cooldown_s=1.0)))


def nothing_to_win() -> PolicyConfig:
    """The same with an arm whose trial shows at once that nothing is won."""
    plain = impatient_policy()
    telling = replace(plain.arm("head"), probe_gain_share=0.8, probe_gain_share_sd=0.05, prior_s_per_position=DEAR_S)
    return replace(plain, arms=(plain.arm("skip"), telling))


def after_failures(tmp_path: Path, policy: PolicyConfig) -> tuple[PolicyState, list[str]]:
    """The state and all stages after a shift that the arm can do nothing about."""
    world, service = make(tmp_path, policy)
    world.recovers["head"], world.s_per_position = 0.0, DEAR_S
    now_s = drive(world, service, 1000, 30)
    world.shift("python", 0.4)
    drive(world, service, now_s, 150)
    return service.state.policy, [record.stage for record in records(tmp_path)]

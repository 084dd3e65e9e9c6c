"""The decision rule as a pure function."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specblock.bandit.backoff import cooldown_left_s
from specblock.bandit.config import Arm, CostConfig, ParityConfig, PolicyConfig
from specblock.bandit.decision import (
    ABANDON,
    CHECK,
    CONTINUE,
    DRIFT,
    FAULT,
    LOAD,
    NONE,
    PROBE,
    SKIP,
    ArmEvidence,
    Charge,
    DecisionContext,
    DomainContext,
    ParityRecord,
    PolicyState,
    Probed,
    Target,
)
from specblock.bandit.estimate import LinearEvidence, LinearPrior
from specblock.bandit.forecast import complete_value, domain_gain, probed_gain, score_s
from specblock.bandit.gate import DomainSaving, Saving
from specblock.bandit.learning import end_update, learn_gain, learn_parity, learn_score
from specblock.bandit.parity import ParityEvidence
from specblock.bandit.policy import decide

HEAD = Arm(name="head", patterns=("*head*",), steps=20, learning_rate=1e-3, positions_per_step=1000)
FULL = Arm(
    name="full",
    patterns=("*",),
    steps=60,
    learning_rate=1e-4,
    positions_per_step=1000,
    prior_s_per_position=4e-4,
    drop_recovery=0.6,
    cooldown_s=900.0,
)
CONFIG = PolicyConfig(arms=(Arm(name="skip"), HEAD, FULL))
PARITY_OK = ParityEvidence(
    verdict="ok",
    difference=0.0,
    lower=-0.01,
    upper=0.01,
    live_acceptance=3.0,
    replay_acceptance=3.0,
    conversations=20,
    live_cycles=500,
)
DOMAIN = DomainContext(
    domain="python",
    share=1.0,
    acceptance=2.1,
    reference=3.0,
    drop=0.3,
    drop_se=0.02,
    raw_drop=0.3,
    cycles=500,
    device_s_per_token=0.01,
    measurable=True,
    num_train=64,
    num_heldout=16,
)
CONTEXT = DecisionContext(
    now_s=10_000.0, serving_version="v1", domains=(DOMAIN,), busy_devices=0.8, num_changes=0, observed_s=3600.0
)


def checked(evidence: ParityEvidence = PARITY_OK, version: str = "v1", time_s: float = 9_990.0) -> PolicyState:
    return PolicyState(parity=ParityRecord(version=version, time_s=time_s, evidence=evidence))


def at(**changes: object) -> DecisionContext:
    """The context with one domain changed."""
    return replace(CONTEXT, domains=(replace(DOMAIN, **changes),))  # type: ignore[arg-type]


def saving(relative: float, se: float = 0.01, conversations: int = 12) -> Saving:
    domain = DomainSaving(domain="python", conversations=conversations, saving=relative, se=se)
    return Saving(conversations=conversations, relative=relative, se=se, s_per_token=0.01 * relative, domains=(domain,))


def test_a_large_drop_is_probed_with_the_arm_of_best_net_value() -> None:
    decision, state = decide(CONTEXT, checked(), CONFIG)
    assert (decision.action, decision.verdict) == (PROBE, DRIFT)
    best = max(decision.options, key=lambda option: option.value.net_lower)
    assert decision.arm == best.value.arm and best.value.net_lower > 0
    assert state.decisions == 1 and decision.targets[0].domain == "python"


def test_a_decision_is_a_function_of_its_inputs() -> None:
    assert decide(CONTEXT, checked(), CONFIG) == decide(CONTEXT, checked(), CONFIG)


def test_no_drop_is_no_reason_to_train() -> None:
    decision, _ = decide(at(drop=0.0, raw_drop=0.0, acceptance=3.0), checked(), CONFIG)
    assert (decision.action, decision.verdict) == (SKIP, NONE)


@given(drop=st.floats(0, 0.9), se=st.floats(0, 0.3), busy=st.floats(0, 1), observed=st.floats(0, 1e6))
@settings(max_examples=80, deadline=None)
def test_it_never_probes_unless_the_lower_bound_is_above_zero(
    drop: float, se: float, busy: float, observed: float
) -> None:
    context = replace(at(drop=drop, drop_se=se), busy_devices=busy, observed_s=observed)
    decision, _ = decide(context, checked(), CONFIG)
    option = decision.option()
    assert (decision.action == PROBE) == (option is not None)
    if option is not None:
        assert option.value.net_lower > 0 and not option.blocked


@given(st.floats(0.1, 1e6))
@settings(max_examples=30, deadline=None)
def test_a_higher_price_never_turns_a_skip_into_a_probe(price: float) -> None:
    cheap, _ = decide(CONTEXT, checked(), replace(CONFIG, cost=CostConfig(price=price)))
    dear, _ = decide(CONTEXT, checked(), replace(CONFIG, cost=CostConfig(price=10 * price)))
    assert not (cheap.action == SKIP and dear.action == PROBE)


def test_parity_is_made_sure_of_before_a_probe() -> None:
    for state in (PolicyState(), checked(version="v0"), checked(time_s=9_000.0)):
        decision, _ = decide(CONTEXT, state, CONFIG)
        assert decision.action == CHECK


def test_broken_parity_is_a_fault_whatever_could_be_gained() -> None:
    broken = replace(PARITY_OK, verdict="broken", difference=-0.3)
    decision, _ = decide(CONTEXT, checked(broken), CONFIG)
    assert (decision.action, decision.verdict) == (SKIP, FAULT)
    later = replace(CONTEXT, now_s=10_100.0)
    assert decide(later, checked(broken), CONFIG)[0].action == CHECK, "it is looked at again"


def test_a_reported_change_is_attributed_before_anything_else() -> None:
    changed = replace(at(drop=0.0, raw_drop=0.0), num_changes=1)
    old = replace(CONFIG, parity=ParityConfig(retry_s=5.0))
    assert decide(changed, checked(), old)[0].action == CHECK
    attributed = learn_parity(checked(), "v1", 9_999.0, PARITY_OK, 1)
    assert decide(changed, attributed, old)[0].action == SKIP
    undecided = learn_parity(checked(), "v1", 9_999.0, replace(PARITY_OK, verdict="insufficient"), 1)
    assert undecided.changes_attributed == 0, "no verdict attributes nothing"


def test_a_mix_that_changed_within_its_own_noise_is_not_named() -> None:
    decision, _ = decide(at(drop=0.0, drop_se=0.005, raw_drop=0.05, raw_drop_se=0.03), checked(), CONFIG)
    assert decision.verdict == NONE


def test_a_changed_mix_is_named() -> None:
    decision, _ = decide(at(drop=0.0, raw_drop=0.3), checked(), CONFIG)
    assert (decision.action, decision.verdict) == (SKIP, LOAD)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_train": 3}, "3 of 32 training conversations"),
        ({"num_heldout": 1}, "1 of 8 held-out conversations"),
        ({"num_train": 0}, "no domain has both"),
    ],
)
def test_missing_evidence_is_said(changes: dict[str, int], words: str) -> None:
    decision, _ = decide(at(**changes), checked(), CONFIG)
    assert decision.action == SKIP and words in decision.reason


def test_the_hourly_budget_counts_only_the_last_hour() -> None:
    spent = replace(checked(), charges=(Charge(9_900.0, 597.0),))
    decision, _ = decide(CONTEXT, spent, CONFIG)
    assert decision.action == SKIP and "spent this hour" in decision.reason
    old = replace(checked(), charges=(Charge(6_000.0, 597.0),))
    decision, state = decide(CONTEXT, old, CONFIG)
    assert decision.action == PROBE and state.charges == ()


def waiting_s(now_s: float, state: PolicyState, drop: float, drop_se: float = 0.0) -> float:
    reached = (Target(domain="python", share=1.0, drop=drop, drop_se=drop_se),)
    return cooldown_left_s(HEAD, now_s, state, CONFIG, reached, 0.8)


def test_what_an_update_without_a_gain_cost_is_waited_off() -> None:
    state = end_update(PolicyState(), HEAD, 10_000.0, 0.2, gained=False, spent_s=120.0)
    assert waiting_s(10_000.0, state, 0.2) == pytest.approx(120.0 / (CONFIG.waste_share * 0.8))
    again = end_update(state, HEAD, 10_000.0, 0.2, gained=False, spent_s=30.0)
    assert waiting_s(10_000.0, again, 0.2) == pytest.approx(2 * 30.0 / (CONFIG.waste_share * 0.8))
    assert waiting_s(10_000.0, state, 0.4) == 60.0, "a grown drop is new evidence"
    assert waiting_s(10_000.0, state, 0.4, drop_se=0.11) > 60.0, "but not one within its noise"


def test_abandoned_updates_lengthen_the_cooldown_and_a_grown_drop_ends_the_backoff() -> None:
    state = PolicyState()
    waits = []
    for _ in range(4):
        state = end_update(state, HEAD, 10_000.0, 0.2, gained=False)
        waits.append(waiting_s(10_000.0, state, 0.2))
    assert waits == [120.0, 240.0, 480.0, 960.0]
    assert waiting_s(10_000.0, state, 0.31) == 60.0
    assert waiting_s(10_000.0, end_update(state, HEAD, 10_000.0, 0.2, gained=True), 0.2) == 60.0
    forever = replace(state, training=replace(state.training, in_row=10_000))
    assert waiting_s(10_000.0, forever, 0.2) == CONFIG.backoff_max_s


def test_arms_learn_from_realised_gains() -> None:
    target = Target(domain="python", share=1.0, drop=0.3, drop_se=0.0)
    state = PolicyState()
    before = domain_gain(HEAD, target, state, CONFIG)
    for _ in range(5):
        state = learn_gain(state, HEAD, (target,), saving(0.0), CONFIG, 10_000.0)
    after = domain_gain(HEAD, target, state, CONFIG)
    assert after.mean < 0.3 * before.mean and after.sd < before.sd
    other = replace(target, drop=0.0)
    assert abs(domain_gain(HEAD, other, state, CONFIG).mean) < 0.02


def test_an_arm_that_never_helps_is_given_up() -> None:
    state = checked()
    target = Target(domain="python", share=1.0, drop=0.3, drop_se=0.02)
    for arm in (HEAD, FULL):
        for _ in range(6):
            state = learn_gain(state, arm, (target,), saving(0.0), CONFIG, 10_000.0)
    decision, _ = decide(CONTEXT, state, CONFIG)
    assert decision.action == SKIP


def probed(relative: float, se: float = 0.01, conversations: int = 12) -> DecisionContext:
    target = Target(domain="python", share=1.0, drop=0.3, drop_se=0.02)
    outcome = Probed(arm="head", targets=(target,), saving=saving(relative, se, conversations))
    return replace(CONTEXT, probed=outcome)


def test_the_measured_gain_decides_after_the_trial() -> None:
    go, counted = decide(probed(0.1), checked(), CONFIG)
    assert (go.action, go.arm) == (CONTINUE, "head") and counted.decisions == 0
    assert go.options[0].value.probe_s == 0, "what the trial cost is sunk"
    stop, _ = decide(probed(-0.08), checked(), CONFIG)
    assert stop.action == ABANDON and "-8.0%" in stop.reason


def test_the_bound_is_asked_once_and_after_the_trial_the_rest_need_only_be_expected_to_pay() -> None:
    doubtful = at(drop=0.05)
    rest, _ = decide(doubtful, checked(), CONFIG)
    option = next(option for option in rest.options if option.value.arm == "head")
    assert rest.action == SKIP and option.value.net_lower < 0 < option.value.net
    vague = replace(doubtful, probed=Probed(arm="head", targets=rest.targets, saving=saving(0.0, 0.05)))
    tried, _ = decide(vague, checked(), CONFIG)
    value = tried.options[0].value
    assert tried.action == CONTINUE and value.net_lower < 0 < value.net and "the gate will tell" in tried.reason
    bad = replace(doubtful, probed=Probed(arm="head", targets=rest.targets, saving=saving(-0.02, 0.001)))
    assert decide(bad, checked(), CONFIG)[0].action == ABANDON


def test_a_trial_that_measured_nothing_is_abandoned() -> None:
    decision, _ = decide(probed(0.5, 1e6, 1), checked(), CONFIG)
    assert decision.action == ABANDON and "too few" in decision.reason


def test_a_sharp_measurement_outweighs_the_prior_and_a_vague_one_does_not() -> None:
    target = Target(domain="python", share=1.0, drop=0.3, drop_se=0.02)
    prior = domain_gain(HEAD, target, PolicyState(), CONFIG)
    sharp = probed_gain(HEAD, target, PolicyState(), Probed(arm="head", targets=(), saving=saving(0.02, 1e-4)), CONFIG)
    vague = probed_gain(HEAD, target, PolicyState(), Probed(arm="head", targets=(), saving=saving(0.02, 10.0)), CONFIG)
    measured = 0.02 / HEAD.probe_gain_share
    known = replace(HEAD, probe_gain_share_sd=1e-3)
    surer = probed_gain(known, target, PolicyState(), Probed(arm="head", targets=(), saving=saving(0.02, 1e-4)), CONFIG)
    assert measured < sharp.mean < prior.mean and sharp.sd < prior.sd
    assert abs(surer.mean - measured) < abs(sharp.mean - measured), "what share a trial shows is known only roughly"
    assert vague.mean == pytest.approx(prior.mean, rel=0.01)


def test_regression_matches_a_direct_solution() -> None:
    prior = LinearPrior(0.01, 0.02, 0.4, 0.15)
    evidence = LinearEvidence().observe(0.3, 0.2, 0.03)
    # Two unknowns, one observation: invert the 2 x 2 precision by hand.
    a00, a01, a11 = 1 / 0.03**2 + 1 / 0.02**2, 0.3 / 0.03**2, 0.09 / 0.03**2 + 1 / 0.15**2
    b0, b1 = 0.2 / 0.03**2 + 0.01 / 0.02**2, 0.3 * 0.2 / 0.03**2 + 0.4 / 0.15**2
    det = a00 * a11 - a01**2
    base, slope = (a11 * b0 - a01 * b1) / det, (a00 * b1 - a01 * b0) / det
    found = evidence.predict(0.5, prior)
    assert found.mean == pytest.approx(base + 0.5 * slope)
    assert found.sd == pytest.approx(((a11 - 2 * a01 * 0.5 + a00 * 0.25) / det) ** 0.5)
    known = LinearEvidence().predict(0.5, LinearPrior(0.01, 0.0, 0.4, 0.0))
    assert known.mean == pytest.approx(0.21) and known.sd < 1e-5


def test_learned_training_seconds_replace_the_prior() -> None:
    slow = ArmEvidence()
    for _ in range(10):
        slow = replace(slow, training=slow.training.observe(20.0, 20_000, 200.0))
    state = replace(checked(), arms={"head": slow})
    assert (
        complete_value(HEAD, CONTEXT, state, CONFIG).train_s
        > 50 * complete_value(HEAD, CONTEXT, checked(), CONFIG).train_s
    )


def test_noise_after_an_update_that_no_drop_had_asked_for_does_not_end_its_back_off() -> None:
    state = PolicyState()
    for _ in range(4):
        state = end_update(state, HEAD, 1000.0, 0.0, gained=False)
    assert waiting_s(1000.0, state, 0.0) == 960.0
    assert waiting_s(1000.0, state, 0.001) == 960.0, "a tenth of a per cent is no new evidence"
    assert waiting_s(1000.0, state, 0.2) == 60.0


def test_conversations_of_other_kinds_of_text_do_not_stand_in_for_those_of_the_one_that_fell() -> None:
    fine = replace(DOMAIN, domain="python", share=0.5, drop=0.0, raw_drop=0.0, num_train=500, num_heldout=200)
    fell = replace(DOMAIN, domain="cpp", share=0.5, num_train=4, num_heldout=20)
    decision, _ = decide(replace(CONTEXT, domains=(fine, fell)), checked(), CONFIG)
    assert decision.action == SKIP and "training conversations of what it would be made for" in decision.reason
    few = replace(fell, num_train=100, num_heldout=2)
    decision, _ = decide(replace(CONTEXT, domains=(fine, few)), checked(), CONFIG)
    assert decision.action == SKIP and "held-out conversations of what it would be made for" in decision.reason
    enough = replace(fell, num_train=CONFIG.min_train_windows)
    assert decide(replace(CONTEXT, domains=(fine, enough)), checked(), CONFIG)[0].action == PROBE


def test_a_fault_that_stays_is_looked_at_less_and_less_often() -> None:
    broken, state, now_s, gaps = replace(PARITY_OK, verdict="broken", difference=-0.3), PolicyState(), 10_000.0, []
    for _ in range(12):
        state = learn_parity(state, "v1", now_s, broken, 0)
        waited = next(
            s for s in range(1, 100_000) if decide(replace(CONTEXT, now_s=now_s + s), state, CONFIG)[0].action == CHECK
        )
        gaps.append(waited)
        now_s += waited
    rules = CONFIG.parity
    longest_s = max(rules.every_s, score_s(state, CONFIG).mean / (rules.max_share * CONTEXT.busy_devices))
    assert gaps[0] == rules.retry_s and gaps[1] == 2 * rules.retry_s and gaps[-1] == pytest.approx(longest_s, abs=1.0)
    mended = learn_parity(state, "v1", now_s, PARITY_OK, 0)
    assert mended.parity is not None and mended.parity.broken_in_row == 0
    other = learn_parity(state, "v2", now_s, broken, 0)
    assert other.parity is not None and other.parity.broken_in_row == 1


def test_regular_checks_cost_at_most_their_share_of_serving() -> None:
    quiet = at(drop=0.0, raw_drop=0.0, acceptance=3.0)
    dear = learn_score(checked(), 30.0)
    price_s = score_s(dear, CONFIG).mean
    due_s = price_s / (CONFIG.parity.max_share * CONTEXT.busy_devices)
    assert due_s > CONFIG.parity.every_s
    before = decide(replace(quiet, now_s=9_990.0 + due_s - 1), dear, CONFIG)[0]
    after = decide(replace(quiet, now_s=9_990.0 + due_s + 1), dear, CONFIG)[0]
    assert (before.action, after.action) == (SKIP, CHECK)

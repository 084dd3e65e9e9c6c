"""What the rule learns of its arms: shares of trials, fading gains; and when it stops looking at a candidate."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specblock.bandit.config import Arm
from specblock.bandit.cost import Belief
from specblock.bandit.decision import ArmEvidence, PolicyState, Target
from specblock.bandit.estimate import LinearEvidence, ShareEvidence
from specblock.bandit.forecast import complete_value, domain_gain, faded, gate_conversations, gate_outlook, shown_share
from specblock.bandit.learning import learn_gain, learn_shown
from specblock.bandit.reach import (
    FOUND,
    REHEARSAL,
    newest_of_each,
    reachable_drop,
    told_drop,
    training_focus,
)
from tests.bandit.test_policy import CONFIG, CONTEXT, HEAD, checked, saving

TARGET = Target(domain="python", share=1.0, drop=0.3, drop_se=0.02)


def test_the_share_a_trial_shows_is_learned_from_pairs() -> None:
    state = PolicyState()
    before = shown_share(HEAD, state)
    assert before.mean == pytest.approx(HEAD.probe_gain_share)
    for _ in range(8):
        state = learn_shown(state, HEAD, (TARGET,), saving(0.05, 0.004), saving(0.1, 0.004))
    after = shown_share(HEAD, state)
    assert after.mean == pytest.approx(0.5, abs=0.06) and after.sd < before.sd


def test_an_update_that_gained_nothing_says_nothing_about_shares() -> None:
    nothing = Belief(mean=0.01, sd=0.02)
    assert ShareEvidence().observe(Belief(mean=0.01, sd=0.01), nothing) == ShareEvidence()


def test_a_bad_gain_is_forgotten_in_time() -> None:
    state = PolicyState()
    fresh = domain_gain(HEAD, TARGET, state, CONFIG).mean
    for _ in range(4):
        state = learn_gain(state, HEAD, (TARGET,), saving(0.0), CONFIG, 1000.0)
    soon, later = (
        domain_gain(HEAD, TARGET, faded(state, 1000.0 + hours * 3600.0, CONFIG), CONFIG).mean for hours in (0, 24)
    )
    assert soon < 0.5 * fresh and later > 0.9 * fresh


def test_a_drop_within_its_noise_is_none() -> None:
    assert told_drop(TARGET, CONFIG) == 0.3
    assert told_drop(replace(TARGET, drop=0.05, drop_se=0.03), CONFIG) == 0.0
    assert told_drop(replace(TARGET, drop=0.02, drop_se=0.001), CONFIG) == 0.0


def test_a_small_drop_is_reason_enough_to_look_at_what_served_before() -> None:
    restore, small = Arm(name="restore", restores=True), replace(TARGET, drop=0.025, drop_se=0.007)
    assert CONFIG.min_drop > 0.025 and reachable_drop(HEAD, small, CONFIG) == 0.0
    assert reachable_drop(restore, small, CONFIG) == 0.025
    assert reachable_drop(restore, replace(small, drop_se=0.01), CONFIG) == 0.0, "it may be noise"


REACHED = 0.25 + FOUND * 0.25 / 0.3 * 0.75  # of a drop that comes from a quarter of the text


def test_an_update_reaches_a_drop_in_proportion_to_the_part_of_the_text_it_comes_from() -> None:
    part = replace(TARGET, part=0.25)
    assert reachable_drop(HEAD, part, CONFIG) == pytest.approx(REACHED * 0.3)
    restore = Arm(name="restore", restores=True)
    assert reachable_drop(restore, part, CONFIG) == 0.3, "nothing is trained"
    whole, quarter = (domain_gain(HEAD, target, PolicyState(), CONFIG).mean for target in (TARGET, part))
    assert quarter == pytest.approx(REACHED * whole)


def test_little_is_found_of_a_small_part_and_counting_looks_for_none() -> None:
    tiny, counting = (
        replace(TARGET, part=0.03),
        Arm(name="statistics", patterns=("token_bias.*",), steps=1, learning_rate=1),
    )
    assert reachable_drop(HEAD, tiny, CONFIG) == pytest.approx((0.03 + 0.034 * 0.97) * 0.3)
    assert reachable_drop(counting, replace(TARGET, part=0.25), CONFIG) == pytest.approx(0.25 * 0.3)
    focus = training_focus((replace(tiny, drop=0.0), replace(TARGET, domain="fell", part=0.4)), CONFIG.min_drop)
    assert {name: one.part for name, one in focus.items()} == {TARGET.domain: 1.0, "fell": 0.4}, "noise is no part"


def test_what_needs_least_is_rehearsed_most() -> None:
    fell, fine, other = (
        replace(TARGET, domain=name, drop=drop, share=share)
        for name, drop, share in (("fell", 0.3, 0.9), ("fine", 0.0, 0.1), ("other", 0.15, 0.0))
    )
    expected = {"fell": 10.0, "fine": 60.0, "other": 60.0, "silent": 5.0}
    focus = training_focus((fell, fine, other), 0.03, expected)
    assert focus["fell"].rehearsed == 0.0 and focus["fine"].rehearsed == pytest.approx(0.9 * 60.0)
    assert focus["other"].rehearsed == pytest.approx(0.5 * 60.0)
    silent = focus["silent"]
    assert (silent.weight, silent.rehearsed) == (0.0, 5.0), "nothing is known of it now, but it is expected back"
    assert {one.rehearsed for one in training_focus((fine, fell), 0.03).values()} == {0.0}
    assert training_focus((), 0.03) == {}


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), max_size=40),
    names=st.lists(st.sampled_from("abc"), min_size=40, max_size=40),
    most=st.integers(1, 400),
)
def test_the_newest_of_every_domain_are_trained_on(sizes: list[int], names: list[str], most: int) -> None:
    domains = names[: len(sizes)]
    chosen = newest_of_each(domains, sizes, most)
    assert chosen == sorted(set(chosen)) and bool(chosen) == bool(sizes)
    assert sum(sizes[i] for i in chosen) <= most or len(chosen) == 1
    if sum(sizes) <= most:
        assert len(chosen) == len(sizes)
    room = REHEARSAL * most / max(len(set(domains)), 1)
    for name in set(domains):
        newest = max(i for i, domain in enumerate(domains) if domain == name)
        assert sizes[newest] > room or newest in chosen, "there is room for the newest of each"


def test_what_a_mixture_gained_does_not_make_the_arm_look_bad() -> None:
    """Half of the gain for a quarter of the text is what was expected, not a failure."""
    fresh = domain_gain(HEAD, TARGET, PolicyState(), CONFIG).mean
    small, whole = saving(REACHED * fresh, 0.004), replace(TARGET, part=1.0)
    as_part = learn_gain(PolicyState(), HEAD, (replace(TARGET, part=0.25),), small, CONFIG, 1000.0)
    as_whole = learn_gain(PolicyState(), HEAD, (whole,), small, CONFIG, 1000.0)
    assert domain_gain(HEAD, TARGET, as_part, CONFIG).mean == pytest.approx(fresh, rel=0.02)
    assert domain_gain(HEAD, TARGET, as_whole, CONFIG).mean < 0.8 * fresh


def test_a_small_gain_is_dear_to_prove() -> None:
    few, many, most = (gate_conversations(gain, CONFIG) for gain in (0.1, 0.02, 0.0))
    assert CONFIG.gate.min_conversations == few < many < most == CONFIG.gate.max_conversations


def test_the_gate_is_left_when_looking_on_costs_more_than_it_may_bring() -> None:
    value = complete_value(HEAD, CONTEXT, checked(), CONFIG)
    good = gate_outlook(value, saving(0.08, 0.02, 20), checked(), CONFIG)
    bad = gate_outlook(value, saving(-0.02, 0.01, 60), checked(), CONFIG)
    assert good[0] > good[1] and bad[0] < bad[1]


def test_one_unlucky_look_does_not_end_what_was_expected_to_pay() -> None:
    value = complete_value(HEAD, CONTEXT, checked(), CONFIG)
    sure = replace(value, domains=tuple(replace(d, mean=0.08, sd=0.02) for d in value.domains))
    doubted = replace(value, domains=tuple(replace(d, mean=0.0, sd=0.02) for d in value.domains))
    unlucky = saving(0.005, 0.02, 20)
    brings, costs = gate_outlook(sure, unlucky, checked(), CONFIG)
    doubts, more = gate_outlook(doubted, unlucky, checked(), CONFIG)
    assert brings > costs and doubts < more
    # Enough of it is believed whatever had been expected.
    brings, costs = gate_outlook(sure, saving(-0.02, 0.005, 300), checked(), CONFIG)
    assert brings < costs


def test_fading_scales_every_sum() -> None:
    evidence = LinearEvidence().observe(0.3, 0.2, 0.03)
    half = evidence.faded(0.5)
    assert half.count == 1 and math.isclose(half.weight, evidence.weight / 2) and math.isclose(half.xy, evidence.xy / 2)
    assert faded(PolicyState(arms={"head": ArmEvidence(gain=evidence)}), 0.0, CONFIG).arms["head"].gain == evidence

"""From statistics to what the rule reads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specblock.bandit.actions import DomainWindows, WindowSummary
from specblock.bandit.attribution import attribute
from specblock.bandit.config import CostConfig, PolicyConfig, StatisticsConfig
from specblock.bandit.context import base_s_per_token, build_context, reference
from specblock.bandit.decision import DRIFT, NONE, PolicyState
from specblock.bandit.state import BanditState
from tests.bandit.test_acceptance import EVENT

CONFIG = PolicyConfig(
    statistics=StatisticsConfig(reference_cycles=100, min_window_cycles=50, window_events=10, rate_half_life_s=50.0)
)


def feed(state: BanditState, count: int, tokens: int, **changes: object) -> None:
    """``count`` events of ten cycles, one a second."""
    for _ in range(count):
        values = {"sequence": state.learned, "time_s": 1000.0 + state.learned, "committed_tokens": tokens, **changes}
        event = replace(EVENT, accepted_histogram=(0, 0, 0, 10), **values)  # type: ignore[arg-type]
        assert state.learn(event, CONFIG)


def test_drop_is_measured_against_the_versions_own_first_cycles() -> None:
    state = BanditState()
    feed(state, 40, 30)
    feed(state, 10, 21)
    (domain,) = build_context(state, WindowSummary(), "v1", 1050.0, CONFIG).domains
    assert domain.acceptance == pytest.approx(2.1) and domain.reference == pytest.approx(3.0)
    assert domain.drop == pytest.approx(0.3) and domain.raw_drop == pytest.approx(0.3)
    assert domain.measurable


def test_a_new_version_is_measured_against_the_best_the_domain_ever_had() -> None:
    state = BanditState()
    feed(state, 20, 30)
    feed(state, 20, 24, drafter_version="v2")
    (domain,) = build_context(state, WindowSummary(), "v2", 1040.0, CONFIG).domains
    assert domain.drop == pytest.approx(0.2)


def test_a_new_domain_is_measured_against_the_others() -> None:
    state = BanditState()
    feed(state, 20, 30)
    feed(state, 10, 18, domain="manual")
    context = build_context(state, WindowSummary(), "v1", 1030.0, CONFIG)
    assert {d.domain: round(d.drop, 3) for d in context.domains} == {"default": 0.0, "manual": 0.4}
    assert reference("manual", "greedy|1", state, "v1", CONFIG).acceptance(100) == pytest.approx(3.0)


def test_all_of_the_text_is_new_in_a_domain_that_was_never_better() -> None:
    state = BanditState()
    for tokens in (28, 32) * 20:
        feed(state, 1, tokens)
    for tokens in (12, 30) * 5:
        feed(state, 1, tokens, domain="manual")
        feed(state, 1, tokens)
    parts = {d.domain: d.part for d in build_context(state, WindowSummary(), "v1", 1060.0, CONFIG).domains}
    assert parts["manual"] == 1.0 and parts["default"] < 0.6, "half of what used to be fine fell"


def test_the_level_of_training_stands_in_when_no_other_domain_says_anything() -> None:
    state = BanditState()
    feed(state, 20, 20)
    trained = replace(CONFIG, reference_acceptance=2.5)
    (domain,) = build_context(state, WindowSummary(), "v1", 1030.0, trained).domains
    assert domain.drop == pytest.approx(0.2)


def test_strata_without_a_reference_say_nothing() -> None:
    state = BanditState()
    feed(state, 40, 30)
    feed(state, 9, 15, sampling_class="t1.0")
    (domain,) = build_context(state, WindowSummary(), "v1", 1030.0, CONFIG).domains
    assert domain.drop == pytest.approx(0.0) and domain.raw_drop > 0.4


def test_shares_are_shares_of_serving_seconds() -> None:
    state = BanditState()
    for _ in range(100):
        feed(state, 1, 30, domain="a", draft_s=0.0, verify_s=0.3, other_s=0.0)
        feed(state, 1, 30, domain="b", draft_s=0.0, verify_s=0.1, other_s=0.0)
    context = build_context(state, WindowSummary(), "v1", 1200.0, CONFIG)
    shares = {d.domain: d.share for d in context.domains}
    assert shares["a"] == pytest.approx(0.75, abs=0.01) and sum(shares.values()) == pytest.approx(1.0)
    assert context.busy_devices == pytest.approx(0.2, rel=0.05), "0.4 device-seconds every two seconds"
    assert base_s_per_token(context) == pytest.approx(1 / (0.75 / 0.01 + 0.25 / (0.1 / 30)), rel=0.01)


def test_busy_devices_are_at_most_those_that_serve() -> None:
    state = BanditState()
    feed(state, 100, 30, verify_s=9.0)
    busy = build_context(state, WindowSummary(), "v1", 1100.0, CONFIG).busy_devices
    assert busy == 1.0
    two = replace(CONFIG, cost=CostConfig(serving_devices=2.0))
    assert build_context(state, WindowSummary(), "v1", 1100.0, two).busy_devices == 2.0


def test_windows_are_joined_by_domain() -> None:
    state = BanditState()
    feed(state, 5, 30, domain="a")
    row = DomainWindows(domain="a", num_train=7, num_heldout=3, train_positions=99)
    (domain,) = build_context(state, WindowSummary(domains=(row,)), "v1", 1010.0, CONFIG).domains
    assert (domain.num_train, domain.num_heldout, domain.measurable) == (7, 3, True)


def test_a_domain_that_fell_silent_is_not_called_drifted_for_ever() -> None:
    state = BanditState()
    feed(state, 20, 30)
    feed(state, 10, 15)
    soon = build_context(state, WindowSummary(), "v1", 1040.0, CONFIG)
    assert attribute(soon, PolicyState(), CONFIG)[0] == DRIFT
    feed(state, 30, 30, domain="other", time_s=20_000.0)
    later = build_context(state, WindowSummary(), "v1", 20_000.0, CONFIG)
    assert {d.domain: d.measurable for d in later.domains} == {"default": False, "other": True}
    assert attribute(later, PolicyState(), CONFIG)[0] == NONE


def test_a_domain_silent_since_a_promotion_is_still_a_reference() -> None:
    state = BanditState()
    feed(state, 20, 30)
    feed(state, 20, 18, domain="manual", drafter_version="v2")
    (manual,) = [d for d in build_context(state, WindowSummary(), "v2", 1040.0, CONFIG).domains if d.domain == "manual"]
    assert manual.reference == pytest.approx(3.0) and manual.drop == pytest.approx(0.4)
    feed(state, 20, 24, drafter_version="v2")
    (manual,) = [d for d in build_context(state, WindowSummary(), "v2", 1060.0, CONFIG).domains if d.domain == "manual"]
    assert manual.reference == pytest.approx(2.4), "what the serving version reaches counts first"

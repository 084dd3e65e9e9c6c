"""Statistics per domain and version."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from specblock.bandit.acceptance import (
    EXACT,
    OLDER,
    OTHER,
    STEADY,
    DecayedSum,
    DomainStatistics,
    Level,
    VersionStatistics,
)
from specblock.bandit.codec import dumps, loads
from specblock.bandit.config import DetectorConfig, PolicyConfig, StatisticsConfig
from specblock.bandit.events import AcceptanceEvent
from specblock.bandit.state import BanditState

EVENT = AcceptanceEvent(
    incarnation="e0",
    sequence=0,
    time_s=1000.0,
    request_id="r",
    engine="e",
    drafter_version="v1",
    cycles=10,
    committed_tokens=24,
    accepted_histogram=(3, 2, 3, 2),
    rank_histogram=(1, 4, 2, 1),
    draft_s=0.1,
    verify_s=0.3,
    other_s=0.05,
    draft_nodes=80,
)


def learn(statistics: VersionStatistics, event: AcceptanceEvent, **changes: float) -> bool:
    return statistics.learn(event, StatisticsConfig(**changes), DetectorConfig())  # type: ignore[arg-type]


def test_survival_counts_cycles_that_accepted_at_least_k() -> None:
    statistics = VersionStatistics()
    learn(statistics, EVENT)
    assert statistics.survival == [7, 5, 2]
    assert statistics.ranks == [1, 4, 2, 1]
    learn(statistics, replace(EVENT, accepted_histogram=(5, 5), committed_tokens=15))
    assert len(statistics.survival) == 3, "shorter histograms fit into longer ones"


def test_pooled_statistics_halve_after_the_half_life_and_totals_do_not() -> None:
    statistics = VersionStatistics()
    learn(statistics, EVENT, half_life_cycles=10.0)
    learn(statistics, EVENT, half_life_cycles=10.0)
    assert statistics.cycles == pytest.approx(15) and statistics.tokens == pytest.approx(36)
    assert statistics.total_cycles == 20 and statistics.total_tokens == 48 and statistics.requests == 2


def test_a_level_is_established_by_its_first_cycles_and_gets_more_exact_for_a_while() -> None:
    level = Level()
    level.fill(60, 150, 100)
    assert level.acceptance(100) == 0
    level.fill(60, 150, 100)
    assert level.acceptance(100) == 2.5
    level.fill(EXACT * 100 - 120, 250 * EXACT - 300, 100)
    level.fill(1000, 1000, 100)
    assert level.acceptance(100) == 2.5


def test_a_level_goes_on_while_nothing_changes_and_ends_for_good_when_something_does() -> None:
    level = Level()
    for _ in range(4 * EXACT):
        level.fill(50, 120, 100)
        level.fill(50, 130, 100)
    assert level.cycles == 4 * EXACT * 100 and level.acceptance(100) == 2.5
    for tokens in (*(110, 120) * 8 * EXACT, *(120, 130) * 16 * EXACT):
        level.fill(50, tokens, 100)
    assert level.closed and level.cycles == 4 * EXACT * 100 and level.acceptance(100) == 2.5


def test_a_level_ends_when_it_is_exact_enough() -> None:
    level = Level()
    for _ in range(2 * STEADY):
        level.fill(50, 120, 100)
        level.fill(50, 130, 100)
    assert level.cycles == STEADY * 100 == level.sums.x


def test_windows_behind_the_newest_are_kept_in_bounded_sums_until_the_version_serves_again() -> None:
    statistics = VersionStatistics()
    for _ in range(10 * (OLDER + 5)):
        learn(statistics, EVENT, window_events=10)
    assert len(statistics.recent) == 10 and len(statistics.older) == OLDER
    assert statistics.older[-2].strata["greedy|1"].units == 10 and statistics.older[-2].strata["greedy|1"].y == 240
    assert loads(VersionStatistics, dumps(statistics)) == statistics
    statistics.resumed = True
    learn(statistics, EVENT, window_events=10)
    assert not statistics.older


def test_rate_of_a_steady_flow_is_exact_however_young() -> None:
    for length in (300, 5000):
        flow = DecayedSum()
        for i in range(length):
            flow.add(3.0, 1000.0 + i, 100.0)
        assert flow.rate(1000.0 + length, 100.0) == pytest.approx(3.0, rel=0.02)
    assert flow.rate(1000.0 + 5000 + 1000, 100.0) < 0.01


def test_a_late_arrival_counts_as_much_as_one_in_time() -> None:
    early, late = DecayedSum(), DecayedSum()
    for time_s in (1000.0, 1050.0):
        early.add(1.0, time_s, 100.0)
    for time_s in (1050.0, 1000.0):
        late.add(1.0, time_s, 100.0)
    assert early.rate(1060.0, 100.0) == pytest.approx(late.rate(1060.0, 100.0))


def test_flagged_events_are_traffic_but_not_statistics() -> None:
    domain = DomainStatistics()
    domain.learn(replace(EVENT, flagged=True), StatisticsConfig(), DetectorConfig())
    assert domain.versions == {} and domain.tokens.value == 24


def test_old_versions_domains_and_strata_are_bounded() -> None:
    config = PolicyConfig(statistics=StatisticsConfig(max_versions=2, max_domains=3, max_strata=3))
    state = BanditState()
    for i in range(12):
        event = replace(
            EVENT,
            sequence=i,
            time_s=1000.0 + i,
            drafter_version=f"v{i % 4}",
            domain=f"d{i}",
            sampling_class=f"t{i}",
        )
        assert state.learn(event, config)
    assert set(state.domains) == {"d0", "d1", OTHER}
    pooled = state.domains[OTHER]
    assert set(pooled.versions) == {"v2", "v3"}, "the newest stay"
    same = [
        replace(EVENT, sequence=100 + i, drafter_version="v3", domain="x", sampling_class=f"s{i}") for i in range(9)
    ]
    assert sum(state.learn(event, config) for event in same) == len(same)
    assert len(pooled.versions["v3"].strata) == 3 and OTHER in pooled.versions["v3"].strata


def test_a_fall_within_a_stratum_is_reported_and_a_change_of_mix_is_not() -> None:
    detector = DetectorConfig()
    config = StatisticsConfig(reference_cycles=300)

    def events(hot_share: float, fall: int) -> int:
        statistics, reports, random = VersionStatistics(), 0, np.random.default_rng(1)
        for i in range(600):
            hot = bool(random.random() < (0.2 if i < 300 else hot_share))
            tokens = (18 if hot else 30) + int(random.integers(-5, 6)) - (fall if i >= 300 else 0)
            event = replace(
                EVENT,
                committed_tokens=tokens,
                accepted_histogram=(0, 0, 0, 10),
                sampling_class="t1.0" if hot else "greedy",
            )
            reports += statistics.learn(event, config, detector)
        return reports

    assert events(0.2, 0) == 0
    assert events(0.9, 0) == 0, "only the mix changed"
    assert events(0.2, 6) > 0


def test_the_state_survives_its_snapshot_bit_for_bit() -> None:
    state, config = BanditState(), PolicyConfig()
    for i in range(50):
        state.learn(replace(EVENT, sequence=i, time_s=1000.0 + i / 3, draft_s=0.1 / (i + 1)), config)
    again = loads(BanditState, dumps(state))
    assert again == state and dumps(again) == dumps(state)
    for s in (state, again):
        s.learn(replace(EVENT, sequence=50, time_s=1100.0), config)
    assert dumps(again) == dumps(state)

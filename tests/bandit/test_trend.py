"""A drop that grows is told from one that came at once, and from noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from specblock.bandit.acceptance import OLDER, OLDEST, TOGETHER, VersionStatistics
from specblock.bandit.codec import dumps, loads
from specblock.bandit.config import DetectorConfig
from specblock.bandit.fall import measured_fall
from specblock.bandit.trend import growing_s, growth
from tests.bandit.test_acceptance import EVENT
from tests.bandit.test_fall import CONFIG, STRATUM, serve

EVERY_S = 0.625
"""Between requests."""


def served(seed: int, acceptance_N: np.ndarray) -> VersionStatistics:
    statistics = VersionStatistics()
    serve(statistics, np.random.default_rng(seed), acceptance_N, EVERY_S)
    return statistics


def grew_s(statistics: VersionStatistics) -> float:
    levels = {STRATUM: statistics.strata[STRATUM]}
    return growing_s(statistics, levels, measured_fall(statistics, levels))


USUAL = np.full(6000, 2.2)


def test_a_slow_fall_has_grown_since_it_began() -> None:
    fall = np.linspace(2.2, 1.9, 12000)
    found = [grew_s(served(seed, np.concatenate([USUAL, fall]))) for seed in range(6)]
    assert np.median(found) == pytest.approx(EVERY_S * len(fall), rel=0.35)
    assert min(found) > 0


def test_a_drop_that_came_at_once_does_not_grow() -> None:
    """Wherever in a block the change falls."""
    grown = [
        grew_s(served(seed, np.concatenate([np.full(6000 + 110 * seed, 2.2), np.full(since, 1.8)])))
        for seed in range(7)
        for since in (800, 4000, 8000)
    ]
    assert sum(one > 0 for one in grown) <= 1, "three standard errors are exceeded by chance once in 700"


def test_requests_that_are_all_alike_do_not_grow() -> None:
    statistics = VersionStatistics()
    for number in range(8000):
        event = replace(EVENT, cycles=32 if number < 4000 else 40, committed_tokens=64, time_s=1e6 + number)
        event = replace(event, accepted_histogram=(0, event.cycles))
        statistics.learn(event, CONFIG, DetectorConfig())
    assert grew_s(statistics) == 0.0


def test_noise_does_not_grow() -> None:
    assert [grew_s(served(seed, np.full(12000, 2.2))) for seed in range(10)] == [0.0] * 10


def test_growth_is_none_of_a_drop_that_stays_and_at_most_as_much_again() -> None:
    assert growth(0.0, 1000.0) == growth(1000.0, 0.0) == 1.0
    assert growth(1000.0, 1.0) == pytest.approx(1.0005, abs=1e-6), "half a second of the mean ahead"
    steps = [growth(1000.0, lasting_s) for lasting_s in (10.0, 1000.0, 1e5)]
    assert steps == sorted(steps) and steps[1] == pytest.approx(1 + np.exp(-1)) and 1.98 < steps[2] < 2.0


def test_what_is_remembered_is_bounded_and_loses_no_request() -> None:
    statistics = served(0, np.full(192 * (OLDER + 3 * TOGETHER), 2.2))
    blocks = [*statistics.oldest, *statistics.older]
    assert sum(block.units for block in blocks) + len(statistics.recent) == statistics.requests
    assert [block.windows for block in statistics.oldest[:-1]] == [TOGETHER] * (len(statistics.oldest) - 1)
    times = [block.time_s for block in blocks]
    assert times == sorted(times)
    assert loads(VersionStatistics, dumps(statistics)) == statistics
    statistics.oldest = statistics.oldest * (OLDEST + 5)
    for _ in range(192 * TOGETHER + 1):
        statistics.learn(EVENT, CONFIG, DetectorConfig())
    assert len(statistics.oldest) == OLDEST

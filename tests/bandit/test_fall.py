"""How far acceptance fell, and in what part of the text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from specblock.bandit.acceptance import Level, VersionStatistics
from specblock.bandit.config import DetectorConfig, StatisticsConfig
from specblock.bandit.fall import Fall, measured_fall
from tests.bandit.test_acceptance import EVENT

CONFIG = StatisticsConfig(window_events=192)
STRATUM = "greedy|1"
TOKENS, SCATTER = 64, 0.15


def serve(
    statistics: VersionStatistics, random: np.random.Generator, acceptance_N: np.ndarray, every_s: float = 0.0
) -> None:
    """One request of 64 tokens at each acceptance length, scattered by 15 % as requests are."""
    for number, acceptance in enumerate(acceptance_N):
        hard = np.exp(SCATTER * random.standard_normal() - SCATTER**2 / 2)
        cycles = int(np.floor(TOKENS / acceptance * hard + random.uniform()))
        event = replace(EVENT, cycles=cycles, committed_tokens=TOKENS, accepted_histogram=(0, cycles))
        event = replace(event, time_s=event.time_s + every_s * number)
        statistics.learn(event, CONFIG, DetectorConfig())


def served(seed: int, *stretches: np.ndarray) -> VersionStatistics:
    statistics, random = VersionStatistics(), np.random.default_rng(seed)
    for acceptance_N in stretches:
        serve(statistics, random, acceptance_N)
    return statistics


def mixed(seed: int, part: float, count: int, low: float) -> np.ndarray:
    """A part of the requests at the acceptance ``low``, the others at 2.2."""
    new_N = np.random.default_rng(seed).uniform(size=count) < part
    return np.where(new_N, low, 2.2)


def fall_of(statistics: VersionStatistics) -> Fall:
    return measured_fall(statistics, {STRATUM: statistics.strata[STRATUM]})


USUAL = np.full(1000, 2.2)


def test_older_requests_that_agree_make_a_drop_exact() -> None:
    pooled = served(1, USUAL, np.full(1500, 2.0))
    few, many = fall_of(replace(pooled, older=[])), fall_of(pooled)
    assert many.se < 0.75 * few.se, "the rest is the reference's own error"
    assert many.drop == pytest.approx(1 / 11, abs=3 * many.se) and many.reference == pytest.approx(2.2, rel=0.03)


def test_a_sudden_change_leaves_the_newest_requests_alone() -> None:
    for seed in range(5):
        fall = fall_of(served(seed, USUAL, np.full(1500, 2.2), np.full(192, 1.78)))
        assert fall.drop == pytest.approx(1 - 1.78 / 2.2, abs=0.04), "what was before must not blur it"


def test_noise_seldom_looks_like_a_drop() -> None:
    """Many looks at what has not changed: pooled, the most extreme of them is less so."""
    found, alone = [], []
    for seed in range(4):
        random, statistics = np.random.default_rng(seed), served(seed, USUAL)
        pooled, few = [], []
        for _ in range(60):
            serve(statistics, random, np.full(64, 2.2))
            pooled.append(fall_of(statistics).drop)
            few.append(fall_of(replace(statistics, older=[])).drop)
        found.append(max(pooled) - np.median(pooled))
        alone.append(max(few) - np.median(few))
    assert np.mean(found) < 0.7 * np.mean(alone)


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_the_part_of_the_text_that_fell_shows_in_the_scatter(part: float) -> None:
    parts = [fall_of(served(seed, USUAL, mixed(seed, part, 1500, 1.5))).part for seed in range(8)]
    assert np.mean(parts) == pytest.approx(part, abs=0.12)


def test_where_all_of_the_text_fell_the_part_is_nearly_the_whole() -> None:
    assert np.mean([fall_of(served(seed, USUAL, np.full(400, 1.78))).part for seed in range(8)]) > 0.85


def test_nothing_is_told_of_the_part_without_scatter_at_the_reference() -> None:
    statistics = served(1, np.full(300, 1.78))
    fall = measured_fall(statistics, {STRATUM: Level(10_000, 22_000)})
    assert fall.part == 1.0 and fall.drop > 0.1


def test_strata_without_a_reference_are_left_out() -> None:
    statistics = served(1, np.full(400, 2.0))
    assert measured_fall(statistics, {STRATUM: Level()}) == Fall()
    assert measured_fall(VersionStatistics(), {}) == Fall()

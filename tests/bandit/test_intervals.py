"""Ratios from sums."""

from __future__ import annotations

import pytest

from specblock.bandit.intervals import RatioSums, agree, ratio_of

PAIRS = [(10.0, 24.0), (20.0, 40.0), (12.0, 30.0), (9.0, 17.0)]


def test_sums_of_parts_are_sums_of_the_whole() -> None:
    assert ratio_of(PAIRS[:1]).plus(ratio_of(PAIRS[1:])) == ratio_of(PAIRS)


def test_scaled_sums_are_those_of_scaled_pairs() -> None:
    scaled, direct = ratio_of(PAIRS).scaled(2.5), ratio_of((2.5 * x, y) for x, y in PAIRS)
    assert scaled.ratio == pytest.approx(direct.ratio) and scaled.se == pytest.approx(direct.se)
    assert scaled.relative_variance == pytest.approx(ratio_of(PAIRS).relative_variance)


def test_relative_variance_is_that_around_the_common_ratio() -> None:
    assert ratio_of([(10.0, 18.0), (10.0, 22.0)]).relative_variance == pytest.approx(2 * 2.0**2 / 20.0**2)
    assert ratio_of([(10.0, 20.0), (30.0, 60.0)]).relative_variance == pytest.approx(0.0)
    assert ratio_of(PAIRS[:1]).relative_variance is None


def test_ratios_agree_within_their_errors() -> None:
    low, high = ratio_of([(10.0, 18.0), (10.0, 22.0)] * 50), ratio_of([(10.0, 20.0), (10.0, 24.0)] * 50)
    assert agree(low, low, 0.0) and not agree(low, high, 6.0) and agree(low, high, 8.0)
    assert agree(low, RatioSums(), 1.0), "nothing speaks against what nothing is known of"

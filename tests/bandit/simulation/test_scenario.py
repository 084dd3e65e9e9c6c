"""Traffic as the scenarios describe it."""

from __future__ import annotations

import numpy as np
import pytest

from specblock.bandit.simulation.scenario import SCENARIOS, START_S, Traffic, make_traffic, scenario_named
from tests.bandit.simulation.small import CURVES

DURATION_S, RATE_PER_S = 7200.0, 2.0


def traffic(name: str, seed: int = 0) -> Traffic:
    return make_traffic(scenario_named(name), CURVES, seed, DURATION_S, RATE_PER_S)


def share(found: Traffic, begin: float, end: float) -> float:
    """Share of the second kind of text between two shares of the duration."""
    passed = (found.time_s - START_S) / DURATION_S
    return float(found.kind[(passed >= begin) & (passed < end)].mean())


@pytest.mark.parametrize("name", [scenario.name for scenario in SCENARIOS])
def test_arrivals_are_ordered_as_many_as_asked_for_and_the_same_for_a_seed(name: str) -> None:
    found, again, other = traffic(name), traffic(name), traffic(name, seed=1)
    assert (np.diff(found.time_s) >= 0).all()
    assert found.time_s[0] >= START_S and found.time_s[-1] < found.end_s == START_S + DURATION_S
    assert len(found.time_s) == pytest.approx(DURATION_S * RATE_PER_S, rel=0.03)
    assert found.heldout.mean() == pytest.approx(CURVES.heldout_fraction, abs=0.02)
    assert (found.time_s == again.time_s).all() and (found.kind == again.kind).all()
    assert len(found.time_s) != len(other.time_s) or (found.time_s != other.time_s).any()


def test_abrupt_changes_once() -> None:
    found = traffic("abrupt")
    assert (share(found, 0.0, 1 / 6 - 1e-9), share(found, 1 / 6, 1.0)) == (0.0, 1.0)
    assert found.domains == ("python", "cpp") and (found.domain == found.kind).all()


def test_slow_changes_beneath_one_name() -> None:
    found = traffic("slow")
    assert found.domains == ("default",) and not found.domain.any()
    assert share(found, 0.0, 0.16) == 0.0 and share(found, 0.85, 1.0) == 1.0
    assert share(found, 0.45, 0.55) == pytest.approx(0.5, abs=0.05)


def test_recurring_takes_turns() -> None:
    found = traffic("recurring")
    assert [share(found, n / 6, (n + 1) / 6 - 1e-9) for n in range(6)] == [0, 1, 0, 1, 0, 1]


def test_bursts_are_short_and_rare() -> None:
    shares, lengths = [], []
    for seed in range(8):
        found = traffic("bursty", seed)
        shares.append(found.kind.mean())
        edges = np.flatnonzero(np.diff(found.kind))
        lengths += np.diff(found.time_s[edges])[::2].tolist()
    assert 0.05 < np.mean(shares) < 0.3 and np.median(lengths) == pytest.approx(300.0, abs=10.0)


def test_stationary_never_changes_and_a_fault_begins_after_a_third() -> None:
    assert not traffic("stationary").kind.any() and traffic("stationary").fault_s > traffic("stationary").end_s
    assert not traffic("fault").kind.any() and traffic("fault").fault_s == START_S + DURATION_S / 3


def test_an_unknown_scenario_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no scenario is called 'sudden'; there are abrupt, slow"):
        scenario_named("sudden")

"""What probes may lose."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from specblock.daemon.probe_budget import ProbeBudget


@given(st.floats(0.002, 0.1), st.lists(st.floats(0.001, 0.1), min_size=50, max_size=400), st.integers(1, 10))
def test_probes_never_lose_more_than_their_share(share: float, cycle_s: list[float], length: int) -> None:
    budget = ProbeBudget(share)
    left, total_s, lost_s = 0, 0.0, 0.0
    for seconds in cycle_s:
        if not left and budget.take(length * 0.05):
            left = length
        budget.earn(seconds)
        total_s += seconds
        if left:
            budget.lose(0.5 * seconds)
            lost_s += 0.5 * seconds
        left = max(0, left - 1)
        assert lost_s <= share * total_s + 1e-9


def test_a_grant_is_paid_back() -> None:
    budget = ProbeBudget(0.01)
    assert not budget.take(1.0)
    budget.grant()
    assert budget.is_near() and budget.take(1.0)
    budget.lose(1.0)
    assert not budget.take(1.0)
    budget.earn(150.0)  # 1.5 s earned: the grant is paid, the next probe is not
    assert budget.is_near() and not budget.take(1.0)
    budget.earn(60.0)
    assert budget.take(1.0)


def test_quiet_time_does_not_pile_up_probes() -> None:
    budget, probes = ProbeBudget(0.01), 0
    budget.take(1.0)
    budget.earn(1e6)
    while budget.take(1.0):
        budget.lose(1.0)
        probes += 1
    assert probes == 2

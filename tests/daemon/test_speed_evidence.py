"""How far a speed seen in some requests can be trusted."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specblock.daemon.speed_evidence import STRETCH_CYCLES, SpeedEvidence


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 8), st.floats(0.5, 3.0), st.booleans()), max_size=300),
    st.integers(1, 120),
)
def test_sums_are_those_of_the_stretches_kept(steps: list[tuple[int, int, float, bool]], window: int) -> None:
    evidence = SpeedEvidence(window)
    for request, tokens, plain_cycles, absorbs in steps:
        if absorbs:
            evidence.absorbed(plain_cycles)
        else:
            evidence.add(f"r{request}", tokens, plain_cycles)
    kept = list(evidence._stretches)
    assert evidence.count == sum(s.count for s in kept)
    assert not kept or evidence.count - kept[0].count < window
    assert len(evidence._open) <= len(kept) and all(any(s is o for s in kept) for o in evidence._open.values())
    tokens, cycles = sum(s.tokens for s in kept), sum(s.plain_cycles for s in kept)
    assert evidence.decoding(1.1, 8.0) == pytest.approx((tokens + 8.8) / (cycles + 8.0))
    cycles += sum(s.absorbing for s in kept) + evidence._pending
    assert evidence.speed(1.1, 8.0) == pytest.approx((tokens + 8.8) / (cycles + 8.0))


def test_a_long_request_is_several_stretches() -> None:
    evidence = SpeedEvidence(1000)
    for _ in range(3 * STRETCH_CYCLES + 1):
        evidence.add("r", 2, 1.5)
    assert len(evidence) == 4


def test_doubt_is_what_requests_differ_by() -> None:
    """In half of the requests every draft is right: cycles are many, requests few."""
    rng, reached, doubts = np.random.default_rng(0), [], []
    for _ in range(300):
        evidence = SpeedEvidence(400)
        for request in range(12):
            tokens = 4 if rng.random() < 0.5 else 2
            for _ in range(25):
                evidence.add(f"r{request}", tokens, 2.0)
        reached.append(evidence.speed())
        doubts.append(evidence.doubt())
    spread = float(np.std(reached))
    assert np.mean(doubts) == pytest.approx(spread, rel=0.1)
    assert spread > 2 * math.sqrt(900) / 600, "far more than a Poisson count of tokens would leave"


def test_doubt_is_at_least_that_of_a_count() -> None:
    evidence = SpeedEvidence(400)
    assert evidence.doubt() == math.inf
    for cycle in range(100):
        evidence.add(f"r{cycle // 25}", 2, 2.0)
    assert evidence.doubt() == pytest.approx(math.sqrt(200) / 200)

"""Ranking a chain's candidates by pairs: the definition, and the native operation against it."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specblock.cuda_ext.native import native_available
from specblock.cuda_ext.pair_gains import PairGains, PairStrength, follow_chain, follow_chain_reference
from tests.random_pairs import random_pairs, random_proposals

NONE = PairStrength(weight=0.5, noisy=False, scale=1.0)


def pairs_of(gains: dict[tuple[int, int], float], rest: list[float]) -> PairGains:
    """A table written out, with room behind its pairs."""
    size, known = len(rest), sorted(gains)
    starts = [sum(before < token for before, _ in known) for token in range(size + 1)]
    return PairGains(
        starts=torch.tensor(starts, dtype=torch.int32),
        tokens=torch.tensor([after for _, after in known] + [0, 0], dtype=torch.int32),
        gains=torch.tensor([gains[pair] for pair in known] + [9.0, 9.0]),
        rest=torch.tensor(rest),
        keys=torch.tensor([a * size + b for a, b in known] + [size * size] * 2),
    )


def test_gains_are_those_of_the_pair_or_of_the_rest() -> None:
    known = pairs_of({(0, 2): 1.0, (0, 3): 2.0, (3, 0): -1.0}, [-0.1, -0.2, -0.3, -0.4])
    before, token = torch.tensor([0, 0, 0, 3, 3, 2]), torch.tensor([2, 3, 1, 0, 3, 2])
    assert known.of(before, token).tolist() == pytest.approx([1.0, 2.0, -0.1, -1.0, -0.4, -0.3])


@pytest.mark.parametrize("call", [follow_chain, follow_chain_reference])
def test_a_chain_is_followed_by_what_goes_with_it(call) -> None:
    known = pairs_of({(5, 1): 4.0, (1, 0): 6.0}, [0.0] * 8)
    token = torch.tensor([[[[5, 6], [7, 1], [2, 0]]]])
    log_prob = torch.tensor([[[[0.6, 0.3], [0.5, 0.2], [0.7, 0.1]]]]).log()
    tokens, scores = call(token, log_prob, torch.ones(1, dtype=torch.float64), known, NONE)
    assert tokens.tolist() == [[[[5, 6], [1, 7], [0, 2]]]], "what stands behind 1 is judged by 1, which is now the best"
    assert scores[0, 0, 0].exp().tolist() == pytest.approx([0.6, 0.3])
    lifted = 0.2 * math.exp(0.5 * 4)
    assert scores[0, 0, 1].exp().tolist() == pytest.approx([lifted / (lifted + 0.8), 0.5 / (lifted + 0.8)])


@pytest.mark.parametrize(
    ("temperature", "noisy", "strength"), [(0.0, True, 0.5), (1.0, True, 0.25), (2.0, True, 0.125), (2.0, False, 0.5)]
)
def test_a_gain_counts_like_a_logit(temperature: float, noisy: bool, strength: float) -> None:
    how = PairStrength(weight=0.5, noisy=noisy, scale=2.0)
    assert how.of(torch.tensor([temperature], dtype=torch.float64)).tolist() == [strength]


def test_behind_a_filtered_token_nothing_is_ranked() -> None:
    known = pairs_of({(5, 1): 4.0}, [0.0] * 8)
    token = torch.tensor([[[[5, 6], [7, 1]]]])
    log_prob = torch.tensor([[[[-torch.inf, -torch.inf], [-1.0, -2.0]]]])
    for call in (follow_chain, follow_chain_reference):
        tokens, scores = call(token, log_prob, torch.ones(1, dtype=torch.float64), known, NONE)
        assert torch.equal(tokens, token) and torch.equal(scores, log_prob)


@pytest.mark.parametrize("call", [follow_chain, follow_chain_reference])
def test_at_the_lowest_temperatures_the_best_still_stands(call) -> None:
    known = pairs_of({(5, 1): 3.0, (1, 0): -3.0, (1, 2): -3.0}, [0.0] * 8)
    token = torch.tensor([[[[5, 6], [7, 1], [2, 0]]]])
    log_prob = torch.tensor([[[[-0.1, -3.0], [-0.1, -9.0], [-0.1, -2.5]]]])
    how = PairStrength(weight=0.5, noisy=True, scale=1.0)
    tokens, scores = call(token, log_prob, torch.full((1,), 1e-5, dtype=torch.float64), known, how)
    assert tokens[0, 0, :, 0].tolist() == [5, 1, 2]
    assert scores[0, 0, 1, 0] == pytest.approx(0.0, abs=1e-3) and torch.isfinite(scores[0, 0, 1]).all()
    assert scores[0, 0, 2, 0] < -1e4, "both are far less likely than whatever else there is"


@pytest.mark.parametrize("call", [follow_chain, follow_chain_reference])
def test_what_is_no_number_is_left_as_it_is(call) -> None:
    known = pairs_of({(5, 1): 4.0}, [0.0] * 8)
    token = torch.tensor([[[[5, 6], [7, 1], [2, 3]]]])
    log_prob = torch.tensor([[[[-0.5, -1.0], [-1.0, torch.nan], [-1.0, -2.0]]]])
    tokens, scores = call(token, log_prob, torch.ones(1, dtype=torch.float64), known, NONE)
    assert torch.equal(tokens[:, :, :2], token[:, :, :2])
    assert torch.allclose(scores[:, :, :2], log_prob[:, :, :2], equal_nan=True)


@given(
    batch=st.integers(1, 4), leaves=st.integers(1, 5), slots=st.integers(1, 5), width=st.integers(1, 10),
    noisy=st.booleans(), seed=st.integers(0, 100_000),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_native_and_reference_rank_alike(batch, leaves, slots, width, noisy, seed):
    if not native_available():
        pytest.skip("the native library was not built")
    generator = torch.Generator().manual_seed(seed)
    known, how = random_pairs(40, 200, generator), PairStrength(0.5, noisy, 2.0)
    token, log_prob, temperature = random_proposals(batch, leaves, slots, width, 40, generator)
    with torch.no_grad():
        found = follow_chain(token, log_prob, temperature, known, how)
        expected = follow_chain_reference(token, log_prob, temperature, known, how)
    assert torch.equal(found[0], expected[0])
    assert torch.allclose(found[1], expected[1], atol=1e-5, equal_nan=True)
    assert all((a >= b).all() for a, b in pairwise(found[1].unbind(-1))), "best first"
    assert (found[1][:, :, 1:].exp().sum(dim=-1) <= 1 + 1e-5).all(), "never more than the slot's whole law"

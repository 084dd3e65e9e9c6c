"""Calibration converges to what acceptance shows, stays monotone, and forgets."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specblock.cuda_ext.ops import build_tree, find_child, grow_tree
from specblock.cuda_ext.tree import Candidates, DraftTree
from specblock.drafter.forgetting import ForgettingRatio, non_decreasing
from specblock.drafter.survival import LeafGain, PathNodes, SurvivalTable, extra_tokens, first_blocks
from tests.random_trees import random_candidates

GRID = torch.linspace(-14, 0, 200)


def star(score_BN: Tensor, block_BN: Tensor) -> DraftTree:
    """Trees whose nodes all hang on the root."""
    batch, nodes = score_BN.shape
    root = torch.zeros(batch, 1, dtype=torch.int64)
    zeros = torch.zeros(batch, nodes + 1, dtype=torch.int64)
    depth = torch.cat([root, root.expand(-1, nodes) + 1], dim=1)
    token = torch.arange(nodes + 1).expand(batch, -1)
    score = torch.cat([torch.zeros(batch, 1), score_BN], dim=1)
    return DraftTree(token, zeros, depth, score, torch.cat([root - 1, block_BN], dim=1), zeros, zeros[:, 0] + nodes + 1)


def random_tree(seed: int, batch: int = 3) -> tuple[DraftTree, Tensor, list[int]]:
    """Trees with a walk along each, as acceptance packs it."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 4, (batch, 5), generator=generator)
    candidates = random_candidates(generator, batch, 20, 4, 5, truth)
    tree = build_tree(torch.zeros(batch, dtype=torch.int64), candidates, 12, 5)
    rows = [[0] for _ in range(batch)]
    at = torch.zeros(batch, dtype=torch.int64)
    for d in range(5):
        child = find_child(tree, at, torch.where(at >= 0, truth[:, d], -1))
        at = torch.where(at >= 0, child, at)
        for b in range(batch):
            if at[b] >= 0:
                rows[b].append(int(at[b]))
    width = max(map(len, rows))
    packed = torch.tensor([r + list(range(len(r), width)) for r in rows])
    return tree, packed, [len(r) - 1 for r in rows]


def loop_counts(tree: DraftTree, rows: Tensor, num_accepted: list[int]) -> tuple[int, int]:
    seen = sum(int(size) - 1 for size in tree.size)
    return seen, sum(num_accepted)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_every_draft_is_counted_once(seed: int) -> None:
    tree, rows, num_accepted = random_tree(seed)
    table = SurvivalTable()
    table.observe(tree, rows, num_accepted)
    data = table.snapshot()
    seen, hit = torch.tensor(data["seen"]).sum(), torch.tensor(data["hit"]).sum()
    assert (int(seen), int(hit)) == loop_counts(tree, rows, num_accepted)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10_000), max_size=8))
def test_probability_is_monotone_and_a_probability(seeds: list[int]) -> None:
    table = SurvivalTable(half_life_cycles=20.0)
    for seed in seeds:
        table.observe(*random_tree(seed))
    for block in (0, 1):
        p = table.probability(GRID, block=block)
        assert bool((p.diff() >= -1e-6).all()) and float(p.min()) >= 0 and float(p.max()) <= 1 + 1e-6
    assert float(table.probability(torch.tensor(-torch.inf), block=0)) == 0


def test_without_evidence_the_drafter_is_believed() -> None:
    p = SurvivalTable().probability(GRID, block=0)
    torch.testing.assert_close(p, GRID.clamp(max=-0.01).exp(), rtol=0.2, atol=0.002)


def test_it_learns_the_law_of_each_block() -> None:
    generator = torch.Generator().manual_seed(0)
    table = SurvivalTable(half_life_cycles=1e6)
    for _ in range(300):
        score = -4 * torch.rand(64, 1, generator=generator)
        block = torch.randint(0, 3, (64, 1), generator=generator)
        true_p = torch.where(block > 0, 0.4, 0.9) * score.exp()
        hit = torch.rand(64, 1, generator=generator) < true_p
        rows = torch.tensor([[0, 1]]).expand(64, -1)
        table.observe(star(score, block), rows, hit[:, 0].long().tolist())
    middle = torch.tensor([-0.3, -1.0, -2.0])
    torch.testing.assert_close(table.probability(middle, block=0), 0.9 * middle.exp(), rtol=0.15, atol=0.0)
    blocks = torch.tensor([2, 1, 2])
    torch.testing.assert_close(table.probability(middle, block=blocks), 0.4 * middle.exp(), rtol=0.2, atol=0.0)


def test_it_forgets() -> None:
    table = SurvivalTable(half_life_cycles=50.0)
    tree = star(torch.full((10, 1), -0.7), torch.zeros(10, 1, dtype=torch.int64))
    rows = torch.tensor([[0, 1]]).expand(10, -1)
    at = torch.tensor(-0.7)
    for _ in range(50):
        table.observe(tree, rows, [1] * 10)
    assert float(table.probability(at, block=0)) > 0.85
    for _ in range(50):
        table.observe(tree, rows, [0] * 10)
    assert float(table.probability(at, block=0)) < 0.15


def test_snapshots_come_back() -> None:
    table, gain = SurvivalTable(), LeafGain()
    for seed in range(5):
        table.observe(*random_tree(seed))
        gain.observe([float(seed % 3)], 3, [4], [0.7])
    other, other_gain = SurvivalTable(), LeafGain()
    other.restore(json.loads(json.dumps(table.snapshot())))
    other_gain.restore(json.loads(json.dumps(gain.snapshot())))
    assert torch.equal(other.probability(GRID, block=1), table.probability(GRID, block=1))
    assert [other_gain.tokens(1, n) for n in (4, 8)] == [gain.tokens(1, n) for n in (4, 8)]
    with pytest.raises(ValueError, match="bins"):
        other.restore({"edges": [0.0], "seen": [], "hit": []})


@pytest.mark.parametrize(
    ("blocks", "accepted", "extra"),
    [
        ([0, 0, 1, 1], 4, [2.0, 0.0]),
        ([0, 0, 1, 1], 3, [1.0, 0.0]),
        ([0, 0, 1, 1], 2, [0.0, 0.0]),
        ([0, 1, 0, 1], 4, [1.0, 0.0]),  # the second node was block 1's as well
        ([0, 1, 2, 2], 4, [1.0, 2.0]),
        ([0, 2, 1, 2], 4, [1.0, 1.0]),
    ],
)
def test_extra_tokens_are_those_no_earlier_block_had(blocks: list[int], accepted: int, extra: list[float]) -> None:
    assert extra_tokens(np.array([[3, *blocks]]), [accepted], 2) == extra


def test_what_an_earlier_block_proposed_too_is_its_own_however_it_was_scored() -> None:
    # Tokens 5, 6, 7 below each other; block 2 scores 6 better than block 1 did, and adds 7.
    tokens, parents = [[5, 6, 6, 7]], [[-1, 0, 0, 2]]
    scores, depths = [[-0.5, -2.0, -0.7, -0.9]], [[1, 2, 2, 3]]
    token, depth = torch.tensor(tokens), torch.tensor(depths)
    candidates = Candidates(
        token=token,
        parent=torch.tensor(parents),
        score=torch.tensor(scores),
        depth=depth,
        block=torch.tensor([[0, 0, 1, 1]]),
        slot=0 * token,
        rank=0 * token,
        valid=token > 0,
    )
    tree, offers = grow_tree(torch.tensor([0]), candidates, 4, 3)
    path = torch.tensor([[0, 1, 2, 3]])
    assert tree.block.tolist() == [[-1, 0, 1, 1, -1]]
    first = first_blocks(PathNodes(tree.parent, tree.token, path), offers, [2, 2])
    assert first[0, 1:].tolist() == [0, 0, 1] and extra_tokens(first, [3], 1) == [1.0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_first_blocks_are_the_first_among_equal_paths(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 4, (3, 5), generator=generator)
    candidates = random_candidates(generator, 3, 20, 4, 5, truth)
    tree, offers = grow_tree(torch.zeros(3, dtype=torch.int64), candidates, 12, 5)
    rows = torch.arange(tree.num_rows).expand(3, -1)
    first = first_blocks(PathNodes(tree.parent, tree.token, rows), offers, [12, 8])
    path_of = [
        [paths(c_token, c_parent, i) for i in range(20)]
        for c_token, c_parent in zip(candidates.token.tolist(), candidates.parent.tolist(), strict=True)
    ]
    for b in range(3):
        for row in range(1, int(tree.size[b])):
            own = paths(tree.token[b].tolist(), tree.parent[b].tolist(), row, root=0)
            found = [i for i in range(20) if candidates.valid[b, i] and path_of[b][i] == own]
            assert first[b, row] == (0 if min(found) < 12 else 1)


def paths(token: list[int], parent: list[int], node: int, root: int = -1) -> tuple[int, ...]:
    """Tokens from the root to ``node``."""
    above = () if parent[node] == root else paths(token, parent, parent[node], root)
    return (*above, token[node])


def test_leaf_gain_is_a_ratio_of_sums_by_block_and_count() -> None:
    gain = LeafGain(prior_tokens=0.5)
    assert gain.tokens(1, 8) == 0.5
    for _ in range(400):
        gain.observe([2.0], 1, [8], [1.0])
        gain.observe([1.0], 1, [4], [1.0])
    assert gain.tokens(1, 8) == pytest.approx(2.0, rel=0.05)
    assert gain.tokens(1, 4) == pytest.approx(1.0, rel=0.05)
    assert gain.tokens(1, 16) == pytest.approx(1.5, rel=0.05)
    assert gain.tokens(2, 8) == 0.5


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0.1, 3)), min_size=1, max_size=12))
def test_pooling_gives_the_closest_monotone_sequence(pairs: list[tuple[float, float]]) -> None:
    values, weights = [v for v, _ in pairs], [w for _, w in pairs]
    fitted = non_decreasing(values, weights)
    assert all(a <= b + 1e-9 for a, b in pairwise(fitted))
    # The max-min formula, which is its definition.
    for i in range(len(values)):
        best = max(
            min(
                sum(v * w for v, w in pairs[a : b + 1]) / sum(weights[a : b + 1]) for b in range(i, len(values))
            )
            for a in range(i + 1)
        )  # fmt: skip
        assert fitted[i] == pytest.approx(best, abs=1e-9)


def test_a_forgetting_mean_follows_a_change() -> None:
    mean = ForgettingRatio(half_life=10)
    for _ in range(100):
        mean.add(1.0)
    for _ in range(10):
        mean.add(0.0)
    assert mean.value() == pytest.approx(0.5, abs=0.01)
    assert ForgettingRatio(10).value(0.3, 0.0) == 0.3

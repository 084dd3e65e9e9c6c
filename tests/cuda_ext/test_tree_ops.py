"""Vectorised tree operations against the readable reference, on random trees."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specblock.cuda_ext import reference
from specblock.cuda_ext.native import native_available
from specblock.cuda_ext.ops import (
    NOT_OFFERED,
    ancestor_mask,
    ancestor_mask_vectorised,
    commit_rows,
    commit_rows_vectorised,
    find_child,
    follow_path,
    grow_tree,
    grow_tree_vectorised,
    rank_of_choice,
    rank_of_choice_vectorised,
)
from specblock.cuda_ext.tree import Candidates, DraftTree, Offers, root_only
from tests.random_trees import random_candidates
from tests.strategies import RawTree, raw_trees, to_candidates


def laid_out(tree: RawTree, budget: int) -> list[reference.Row]:
    return reference.prune(reference.merge(tree.tokens, tree.parents, tree.scores), budget)


def built(trees: list[RawTree], budget: int, padding: int = 0) -> tuple[DraftTree, int]:
    depth = max(max(tree.depths) for tree in trees)
    roots = torch.arange(len(trees)) + 100
    return grown(roots, to_candidates(trees, padding), budget, depth)[0], depth


def grown(
    roots: torch.Tensor, candidates: Candidates, budget: int, depth: int, **how: bool
) -> tuple[DraftTree, Offers]:
    """What ``grow_tree`` and the vectorised operation both return."""
    tree, offers = grow_tree(roots, candidates, budget, depth, **how)
    other_tree, other_offers = grow_tree_vectorised(roots, candidates, budget, depth, **how)
    for own, other in ((tree, other_tree), (offers, other_offers)):
        for field in fields(own):
            assert torch.equal(getattr(own, field.name), getattr(other, field.name)), field.name
    return tree, offers


def real_rows(tree: DraftTree, b: int) -> list[tuple[int, int, int, float]]:
    size = int(tree.size[b])
    columns = (tree.token[b], tree.parent[b], tree.depth[b], tree.score[b])
    return list(zip(*(column[:size].tolist() for column in columns), strict=True))


@given(trees=st.lists(raw_trees(), min_size=1, max_size=4), budget=st.integers(0, 30), padding=st.integers(0, 3))
@settings(max_examples=1500, deadline=None)
def test_build_tree_equals_reference(trees, budget, padding):
    tree, _ = built(trees, budget, padding)
    tree.check()
    assert tree.num_rows == min(budget, max(len(t.tokens) for t in trees) + padding) + 1
    for b, raw in enumerate(trees):
        expected = [(row.token, row.parent, row.depth, row.score) for row in laid_out(raw, budget)]
        assert real_rows(tree, b) == [(100 + b, 0, 0, 0.0), *expected[1:]]


@given(trees=st.lists(raw_trees(), min_size=1, max_size=3), budget=st.integers(1, 20))
@settings(max_examples=400, deadline=None)
def test_ancestor_mask_equals_reference(trees, budget):
    tree, depth = built(trees, budget, padding=2)
    mask = ancestor_mask(tree, depth)
    assert torch.equal(mask, ancestor_mask_vectorised(tree, depth))
    for b, raw in enumerate(trees):
        rows = laid_out(raw, budget)
        for r in range(tree.num_rows):
            expected = reference.ancestors(rows, r) if r < len(rows) else {r}
            assert set(mask[b, r].nonzero().flatten().tolist()) == expected


@given(trees=st.lists(raw_trees(), min_size=1, max_size=3), budget=st.integers(1, 20), data=st.data())
@settings(max_examples=250, deadline=None)
def test_walks_equal_reference(trees, budget, data):
    tree, depth = built(trees, budget)
    paths = [data.draw(st.lists(st.integers(-1, 6), min_size=depth + 1, max_size=depth + 1)) for _ in trees]
    for b, raw in enumerate(trees):  # half of the continuations follow a real path of the tree for a while
        node = data.draw(st.integers(-1, len(raw.tokens) - 1))
        prefix: list[int] = []
        while node >= 0:
            prefix.insert(0, raw.tokens[node])
            node = raw.parents[node]
        paths[b][: len(prefix)] = prefix
    accepted = follow_path(tree, torch.tensor(paths))
    for b, raw in enumerate(trees):
        # An entry below 0 ends a known continuation; no token matches it in the reference either.
        assert int(accepted[b]) == len(reference.walk(laid_out(raw, budget), paths[b]))


@given(raw=raw_trees(), budget=st.integers(0, 20))
@settings(max_examples=300, deadline=None)
def test_find_child_equals_reference(raw, budget):
    tree, _ = built([raw], budget, padding=1)
    rows = laid_out(raw, budget)
    for row in range(len(rows)):
        for token in range(-1, 7):
            expected = [r for r in range(1, len(rows)) if rows[r].parent == row and rows[r].token == token]
            assert int(find_child(tree, torch.tensor([row]), torch.tensor([token]))) == (expected or [-1])[0]


def path_to(tree: DraftTree, b: int, row: int) -> list[int]:
    path: list[int] = []
    while row:
        path.insert(0, int(tree.token[b, row]))
        row = int(tree.parent[b, row])
    return path


@given(
    trees=st.lists(raw_trees(), min_size=1, max_size=3),
    budget=st.integers(0, 20),
    padding=st.integers(0, 3),
    seed=st.integers(0, 999),
)
@settings(max_examples=600, deadline=None)
def test_rank_of_choice_equals_reference_at_every_row(trees, budget, padding, seed):
    """Few token ids and small budgets: duplicates, merged parents, candidates whose parent was pruned."""
    raw_candidates = to_candidates(trees, padding)
    rank = torch.randint(0, 12, raw_candidates.token.shape, generator=torch.Generator().manual_seed(seed))
    candidates = replace(raw_candidates, rank=rank)
    depth = max(max(tree.depths) for tree in trees)
    tree, offers = grown(torch.arange(len(trees)), candidates, budget, depth)
    for b, raw in enumerate(trees):
        size = len(raw.tokens)
        for row in range(int(tree.size[b])):
            path = path_to(tree, b, row)
            for token in range(-1, 7):
                extended, expected = reference.rank_of_choice(
                    raw.tokens, raw.parents, rank[b, :size].tolist(), path, token
                )
                want = -1 if not extended else NOT_OFFERED if expected is None else expected
                every = torch.zeros(len(trees), dtype=torch.int64)
                for found in (rank_of_choice, rank_of_choice_vectorised):
                    assert int(found(offers, every + row, every + token)[b]) == want


def test_offers_name_the_surviving_parent_the_root_or_nothing():
    raw = RawTree([7, 7, 3, 4, 3, 9, 5], [-1, -1, 0, 1, 1, 2, -1], [-2.0, -1.0, -3.0, -1.5, -2.5, -3.5, -9.0])
    candidates = to_candidates([raw], padding=1)
    # Rows: 1 is token 7 (candidate 1 won), 2 is token 4, 3 is token 3 (candidate 4 won); candidates 5 and 6 are pruned.
    _, offers = grown(torch.tensor([0]), candidates, 3, 3)
    assert offers.parent_row.tolist() == [[0, 0, 1, 1, 1, 3, 0, -1]]
    _, offers = grown(torch.tensor([0]), candidates, 2, 3)
    assert offers.parent_row.tolist() == [[0, 0, 1, 1, 1, -1, 0, -1]]
    # Unmerged, candidates 1, 3 and 0 are kept, and each 7 has its own children.
    tree, offers = grown(torch.tensor([0]), candidates, 3, 3, merge=False)
    assert tree.token[0].tolist() == [0, 7, 7, 4]
    assert offers.parent_row.tolist() == [[0, 0, 2, 1, 1, -1, 0, -1]]


def test_large_random_trees_hold_every_invariant():
    generator = torch.Generator().manual_seed(0)
    for budget in (1, 40, 400):
        candidates = random_candidates(generator, 6, 300, 50, 9)
        tree, _ = grown(torch.arange(6), candidates, budget, 9)
        tree.check()
        for b in range(6):
            raw = RawTree(candidates.token[b].tolist(), candidates.parent[b].tolist(), candidates.score[b].tolist())
            expected = [(r.token, r.parent, r.depth, r.score) for r in laid_out(raw, budget)]
            assert real_rows(tree, b)[1:] == expected[1:]


@pytest.mark.parametrize("budget", [1, 5, 12, 13, 40])
def test_chain_and_star(budget):
    chain = RawTree(list(range(12)), list(range(-1, 11)), [-0.5 * (i + 1) for i in range(12)])
    star = RawTree(list(range(12)), [-1] * 12, [-float(i) for i in range(12)])
    tree, _ = built([chain, star], budget)
    tree.check()
    kept = min(budget, 12)
    assert tree.size.tolist() == [kept + 1, kept + 1]
    assert tree.depth[0, : kept + 1].tolist() == list(range(kept + 1))
    assert tree.token[1, 1 : kept + 1].tolist() == list(range(kept))


def test_duplicates_leave_no_trace_and_hand_over_their_children():
    raw = RawTree([7, 7, 3, 4, 3], [-1, -1, 0, 1, 1], [-2.0, -1.0, -3.0, -1.5, -2.5])
    tree, _ = built([raw], 10)
    tree.check()
    assert real_rows(tree, 0) == [(100, 0, 0, 0.0), (7, 0, 1, -1.0), (4, 1, 2, -1.5), (3, 1, 2, -2.5)]


def test_root_only_is_a_tree_of_one_row():
    tree = root_only(torch.tensor([5, 6]))
    tree.check()
    assert tree.num_rows == 1
    assert find_child(tree, torch.zeros(2).long(), torch.tensor([5, 6])).tolist() == [-1, -1]
    assert ancestor_mask(tree, 0).tolist() == [[[True]], [[True]]]


def test_check_notices_broken_trees():
    raw = RawTree([1, 2, 3], [-1, 0, 0], [-1.0, -2.0, -2.0])

    def broken(**changes: list[int] | list[float]) -> DraftTree:
        tree, _ = built([raw], 5, padding=1)
        for name, row in changes.items():
            getattr(tree, name)[0, : len(row)] = torch.tensor(row, dtype=getattr(tree, name).dtype)
        return tree

    broken().check()
    for changes in (
        {"token": [100, 1, 2, 2]},
        {"parent": [0, 0, 2]},
        {"depth": [0, 1, 3]},
        {"score": [0.0, -3.0, -2.0]},
        {"parent": [0, 0, 1, 1, 0]},
    ):
        with pytest.raises(AssertionError):
            broken(**changes).check()


@pytest.mark.parametrize("commit", [commit_rows, commit_rows_vectorised])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_commit_rows_with_overlapping_moves(commit, dtype):
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        storage = torch.randn(2, 5, 3, 40, 4, generator=generator).to(dtype)
        slots = torch.randperm(5, generator=generator)[:3]
        start = torch.randint(0, 20, (3,), generator=generator)
        # Ascending rows from 0: every move overlaps the ones before it.
        rows = torch.stack([torch.randperm(14, generator=generator)[:6].sort().values for _ in range(3)])
        rows[:, 0] = 0
        count = torch.randint(1, 7, (3,), generator=generator)
        rows = torch.where(torch.arange(6) < count[:, None], rows, torch.arange(6))
        expected = storage.clone()
        for b in range(3):
            for j in range(int(count[b])):
                slot, at = int(slots[b]), int(start[b])
                expected[:, slot, :, at + j] = storage[:, slot, :, at + int(rows[b, j])]
        # Padding columns name themselves, so they change nothing, unless an earlier column lies there: it does not.
        commit(storage, slots, start, rows)
        assert torch.equal(storage, expected)


@pytest.mark.skipif(not native_available(), reason="native operations were not built")
@pytest.mark.parametrize(
    ("slots", "start", "rows"),
    [
        ([5], [0], [[0, 1]]),
        ([0], [0], [[0, -1]]),
        ([0], [38], [[0, 1, 2]]),
        ([0], [0], [[0, 40]]),
        ([0, 1], [0], [[0]]),
    ],
)
def test_native_commit_stays_inside_its_storage(slots, start, rows):
    with pytest.raises(RuntimeError, match="commit_rows"):
        torch.ops.specblock.commit_rows(
            torch.zeros(2, 5, 3, 40, 4), torch.tensor(slots), torch.tensor(start), torch.tensor(rows)
        )


@pytest.mark.skipif(not native_available(), reason="native operations were not built")
def test_native_walk_refuses_what_does_not_fit():
    tree, law = torch.zeros(1, 3, dtype=torch.int64), [torch.ones(1, dtype=torch.float64)] * 2
    law = [*law, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)]
    fits = [
        torch.zeros(1, 3, 7),
        tree,
        tree,
        torch.zeros(4, 7, dtype=torch.float64),
        torch.zeros(1, 2, dtype=torch.int64),
    ]
    assert torch.ops.specblock.accept_walk(*fits, *law)[2].tolist() == [2]
    for place, wrong in (
        (0, torch.zeros(1, 2, 7)),
        (1, tree.int()),
        (3, torch.zeros(4, 6, dtype=torch.float64)),
        (4, torch.full((1, 2), 4)),
        (4, torch.full((1, 2), -1)),
    ):
        with pytest.raises(RuntimeError):
            torch.ops.specblock.accept_walk(*fits[:place], wrong, *fits[place + 1 :], *law)

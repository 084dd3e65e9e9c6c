"""Slots, staging, commit and rollback against recomputation."""

import pytest
import torch

from specblock.cuda_ext.ops import ancestor_mask, build_tree
from specblock.verifier.kv_cache import TargetCache
from tests.random_trees import random_candidates
from tests.verifier.helpers import tiny_target


def tokens_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 96, shape, generator=torch.Generator().manual_seed(seed))


def small_cache(slots: int = 3, capacity: int = 8) -> TargetCache:
    return TargetCache(
        num_layers=2,
        num_slots=slots,
        num_kv_heads=2,
        capacity_tokens=capacity,
        head_dim=4,
        dtype=torch.float32,
        device="cpu",
    )


def random_path(tree, mask, b: int, generator: torch.Generator) -> list[int]:
    row = int(torch.randint(0, int(tree.size[b]), (1,), generator=generator))
    return mask[b, row].nonzero().flatten().tolist()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_commit_and_rollback_equal_recomputation(family):
    model = tiny_target(family)
    generator = torch.Generator().manual_seed(1)
    cache = model.new_cache(3, 60)
    texts = [tokens_of(2, 5).tolist(), tokens_of(3, 11).tolist(), tokens_of(4, 2).tolist()]
    for text in texts:
        model.prefill(cache, cache.allocate(), torch.tensor(text))
    for cycle in range(8):
        slots = [[0, 1, 2], [2, 0], [1], [1, 2]][cycle % 4]
        candidates = random_candidates(generator, len(slots), 12, 96, 5)
        tree = build_tree(tokens_of(10 + cycle, len(slots)), candidates, 9, 5)
        mask = ancestor_mask(tree, 5)
        model.forward(cache, slots, tree.token, tree_mask=mask, depth=tree.depth)
        paths = [random_path(tree, mask, b, generator) for b in range(len(slots))]
        width = max(len(path) for path in paths)
        rows = torch.tensor([path + list(range(len(path), width)) for path in paths])
        counts = [len(path) if cycle % 3 else 1 + len(path) // 2 for path in paths]
        cache.commit(slots, rows, counts)
        for b, slot in enumerate(slots):
            texts[slot].extend(tree.token[b, paths[b][: counts[b]]].tolist())
        if cycle % 2:
            slot, length = slots[0], len(texts[slots[0]]) - 2
            cache.truncate(slot, length)
            del texts[slot][length:]
        assert cache.lengths == [len(text) for text in texts]
        for slot, text in enumerate(texts):
            fresh = model.new_cache(1, 60)
            model.prefill(fresh, 0, torch.tensor(text))
            for ours, expected in ((cache.keys, fresh.keys), (cache.values, fresh.values)):
                assert torch.allclose(ours[:, slot, :, : len(text)], expected[:, 0, :, : len(text)], atol=2e-5)


def test_moving_rows_is_exact():
    cache = small_cache(slots=2, capacity=12)
    cache.keys.normal_(generator=torch.Generator().manual_seed(0))
    cache.values.normal_(generator=torch.Generator().manual_seed(1))
    cache.lengths = [3, 5]
    keys, values = cache.keys.clone(), cache.values.clone()
    cache.commit(torch.tensor([1, 0]), torch.tensor([[0, 2, 5], [0, 1, 2]]), torch.tensor([3, 1]))
    assert cache.lengths == [4, 8]
    for moved, before in ((cache.keys, keys), (cache.values, values)):
        assert torch.equal(moved[:, 1, :, [5, 6, 7]], before[:, 1, :, [5, 7, 10]])
        assert torch.equal(moved[:, 1, :, :5], before[:, 1, :, :5])
        assert torch.equal(moved[:, 0], before[:, 0])


def test_slots_are_taken_lowest_first():
    cache = small_cache()
    assert [cache.allocate() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="all 3 cache slots are taken"):
        cache.allocate()
    cache.advance([1], [4])
    cache.release(2)
    cache.release(1)
    assert cache.num_free_slots == 2
    assert cache.allocate() == 1
    assert cache.lengths[1] == 0
    with pytest.raises(AssertionError, match="released twice"):
        cache.release(2)


def test_overflow_is_refused_before_the_forward():
    model = tiny_target()
    cache = model.new_cache(2, 6)
    model.prefill(cache, 1, tokens_of(5, 4))
    before = cache.keys.clone()
    with pytest.raises(ValueError, match="slot 1 holds 4 of 6 tokens: no room for 3 rows"):
        model.forward(cache, [0, 1], tokens_of(6, 2, 3))
    assert torch.equal(cache.keys, before)
    model.forward(cache, [0, 1], tokens_of(6, 2, 2))


def test_rollback_must_go_back():
    cache = small_cache()
    cache.advance([0], [3])
    with pytest.raises(ValueError, match="holds 3 tokens: cannot roll back to 4"):
        cache.truncate(0, 4)
    cache.truncate(0, 0)
    assert cache.lengths == [0, 0, 0]


def test_empty_caches_are_refused():
    with pytest.raises(ValueError, match="slots and capacity"):
        small_cache(slots=0)

"""The forward over slots, recorded or not, gives what the forward with masks gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from specblock.cuda_ext.ops import ancestor_mask
from specblock.cuda_ext.recording import batch_buckets
from specblock.cuda_ext.tree import DraftTree
from specblock.verifier.graphs import ForwardGraphs
from specblock.verifier.kv_cache import TargetCache
from specblock.verifier.model import TargetModel
from specblock.verifier.slots import MOST_ROWS
from tests.recorders import FakeRecorder
from tests.verifier.helpers import Request, decode, plain, random_requests, random_trees, tiny_hf_model

VOCAB = 96


def by_slot(family: str = "llama", **changes: Any) -> TargetModel:
    return TargetModel.from_model(tiny_hf_model(family, **changes), by_slot=True)


def with_graphs(target: TargetModel, recorder: FakeRecorder) -> TargetModel:
    """``target`` with recordings that need no CUDA."""
    assert target.by_slot is not None
    slots, kept = target.by_slot, {}

    def recorded(cache: TargetCache) -> ForwardGraphs:
        return kept.setdefault(
            id(cache), ForwardGraphs(target.device, cache.num_slots, cache.capacity_tokens, recorder)
        )

    slots.graphs, slots.graphs_over = True, recorded  # type: ignore[method-assign]
    return target


def random_tree(batch: int, rows: int, seed: int) -> DraftTree:
    tokens = torch.randint(0, VOCAB, (batch, rows), generator=torch.Generator().manual_seed(seed))
    return random_trees(seed, VOCAB, num_raw=max(1, rows - 1), budget=max(1, rows - 1))([0] * batch, tokens[:, 0], [0])[
        0
    ]


def filled(target: TargetModel, lengths: list[int], capacity: int = 40) -> TargetCache:
    cache = target.new_cache(len(lengths), capacity)
    for length in lengths:
        tokens = torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(length))
        target.prefill(cache, cache.allocate(), tokens)
    return cache


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("recorded", [False, True])
def test_the_same_logits_features_and_cache_as_with_masks(family: str, recorded: bool) -> None:
    masks, slots = TargetModel.from_model(tiny_hf_model(family)), by_slot(family)
    if recorded:
        slots = with_graphs(slots, FakeRecorder())
    lengths = [3, 9, 1, 6, 12]
    caches = [filled(target, lengths) for target in (masks, slots)]
    for step, chosen in enumerate([[4], [1, 3, 0], [0, 1, 2, 3, 4], [2, 4]]):
        for rows in (1, 3, 9):
            tree = random_tree(len(chosen), rows, 10 * step + rows)
            mask = ancestor_mask(tree, 5)
            want, got = (
                target.forward(cache, chosen, tree.token, tree_mask=mask, depth=tree.depth)
                for target, cache in zip((masks, slots), caches, strict=True)
            )
            torch.testing.assert_close(got.logits, want.logits)
            torch.testing.assert_close(got.features, want.features)
            for cache in caches:
                order = torch.arange(tree.num_rows).expand(len(chosen), -1)
                cache.commit(chosen, order[:, :1], [1] * len(chosen))
    for slot, length in enumerate(caches[0].lengths):
        torch.testing.assert_close(caches[1].keys[:, slot, :, :length], caches[0].keys[:, slot, :, :length])


@pytest.mark.parametrize("recorded", [False, True])
def test_text_is_that_of_masks(recorded: bool) -> None:
    requests = random_requests(3, 6, VOCAB)
    expected = decode(TargetModel.from_model(tiny_hf_model()), requests, 12).tokens
    target, recorder = by_slot(), FakeRecorder()
    if recorded:
        target = with_graphs(target, recorder)
    assert decode(target, requests, 12, plain).tokens == expected
    result = decode(target, requests, 12, random_trees(5, VOCAB, truth=expected))
    assert result.tokens == expected and result.accepted_drafts > 0
    assert (recorder.replayed > recorder.recorded > 0) == recorded


def test_rows_that_fill_up_touch_no_prefix_and_fit_a_full_slot() -> None:
    target, recorder = by_slot(), FakeRecorder()
    with_graphs(target, recorder)
    cache = filled(target, [5, 20, 20], capacity=20 + 9)
    before = cache.keys.clone(), cache.values.clone()
    tree = random_tree(2, 9, 1)
    assert tree.num_rows == 9
    target.forward(cache, [1, 2], tree.token, tree_mask=ancestor_mask(tree, 5), depth=tree.depth)
    for now, then in zip((cache.keys, cache.values), before, strict=True):
        assert torch.equal(now[:, 0, :, : cache.capacity_tokens], then[:, 0, :, : cache.capacity_tokens])
        for slot in (1, 2):
            assert torch.equal(now[:, slot, :, :20], then[:, slot, :, :20])
            assert not torch.equal(now[:, slot, :, 20:29], then[:, slot, :, 20:29])
        assert torch.isfinite(now).all()
    with pytest.raises(ValueError, match="no room"):
        target.forward(cache, [1], torch.zeros(1, 10, dtype=torch.int64))


def test_a_smaller_batch_after_a_larger_one_sees_nothing_of_it() -> None:
    masks, slots = TargetModel.from_model(tiny_hf_model()), with_graphs(by_slot(), FakeRecorder())
    caches = [filled(target, [4, 4, 4, 4]) for target in (masks, slots)]
    for batch, rows in ((4, 8), (3, 5), (4, 8), (3, 6)):
        tree = random_tree(batch, rows, batch + rows)
        want, got = (
            target.forward(cache, list(range(batch)), tree.token, tree_mask=ancestor_mask(tree, 5), depth=tree.depth)
            for target, cache in zip((masks, slots), caches, strict=True)
        )
        torch.testing.assert_close(got.logits, want.logits)


def test_what_cannot_be_recorded_runs_without_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    requests = [Request(r.prompt, r.params) for r in random_requests(4, 5, VOCAB)]
    expected = decode(TargetModel.from_model(tiny_hf_model()), requests, 8).tokens
    target, recorder = by_slot(), FakeRecorder(fail_at=1)
    with_graphs(target, recorder)
    assert decode(target, requests, 8, random_trees(5, VOCAB, truth=expected)).tokens == expected
    warnings = [r.getMessage() for r in caplog.records if "no CUDA graph" in r.getMessage()]
    assert len(warnings) <= 1 and recorder.recorded <= 1
    cache = filled(target, [3, 3])
    for rows in (1, 9, 20):
        target.forward(cache, [0], torch.zeros(1, rows, dtype=torch.int64))
    warnings = [r.getMessage() for r in caplog.records if "no CUDA graph" in r.getMessage()]
    assert any(message.endswith("operation not permitted") for message in warnings)


def test_prompts_and_long_trees_take_the_other_way() -> None:
    target, recorder = by_slot(), FakeRecorder()
    with_graphs(target, recorder)
    cache = filled(target, [5], capacity=2 * MOST_ROWS)
    target.forward(cache, [0], torch.zeros(1, MOST_ROWS + 1, dtype=torch.int64))
    assert recorder.recorded == 0
    target.forward(cache, [0], torch.zeros(1, MOST_ROWS, dtype=torch.int64))
    assert recorder.recorded == 1


def test_attention_of_another_kind_keeps_its_masks(caplog: pytest.LogCaptureFixture) -> None:
    small = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    model = MistralForCausalLM(MistralConfig(**small, sliding_window=None)).double()
    assert TargetModel.from_model(model, by_slot=True).by_slot is not None
    model = tiny_hf_model()
    for layer in model.model.layers:
        own = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, own=own, **k: own(*a, **k, s_aux=torch.ones(4))
    target = TargetModel.from_model(model, by_slot=True)
    assert target.by_slot is None and target.config._attn_implementation == "sdpa"
    assert any("attention with s_aux" in r.getMessage() for r in caplog.records)
    with pytest.raises(ValueError, match="only full attention"):
        TargetModel.from_model(Gemma2ForCausalLM(Gemma2Config(**small)), by_slot=True)


def test_batch_buckets() -> None:
    assert batch_buckets(1) == (1,)
    assert batch_buckets(6) == (1, 2, 4, 6)
    assert batch_buckets(16) == (1, 2, 4, 8, 16)


def test_results_share_their_memory_and_have_the_size_asked_for() -> None:
    graphs = ForwardGraphs(torch.device("cpu"), 4, 10, FakeRecorder())

    def body(inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        tokens, depth, visible, numbers = inputs
        assert visible.diagonal(dim1=1, dim2=2).all()
        return tokens[..., None].expand(-1, -1, 3) + numbers[2][:, None, None], depth[..., None].double()

    for batch, rows in ((3, 5), (1, 1), (4, 9)):
        tokens = torch.arange(batch * rows).view(batch, rows)
        eye = torch.eye(rows, dtype=torch.bool).expand(batch, -1, -1)
        found = graphs.run(body, list(range(batch)), [7] * batch, tokens, tokens % 3, eye)
        assert found is not None
        assert torch.equal(found[0], tokens[..., None].expand(-1, -1, 3) + 7)
        assert torch.equal(found[1][..., 0], (tokens % 3).double())
    assert graphs.sizes == ((4, 8), (1, 1), (4, 16))
    assert graphs.run(body, [0], [0], torch.zeros(1, 97), torch.zeros(1, 97), torch.eye(97).bool()[None]) is None

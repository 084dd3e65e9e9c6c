"""Blocks over slots, recorded or not, propose what the other forwards propose."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specblock.cuda_ext.linear import round_weights
from specblock.cuda_ext.native import native_available
from specblock.cuda_ext.noise import NoiseWindow
from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams
from specblock.cuda_ext.slot_layer import LayerStack
from specblock.cuda_ext.tree import DraftTree
from specblock.drafter import whole_layers
from specblock.drafter.config import DraftSettings
from specblock.drafter.draft import BlockDrafter
from specblock.drafter.graphs import BlockGraphs
from specblock.drafter.interface import NewPositions
from specblock.drafter.kv_cache import DrafterCache
from specblock.drafter.token_bias import domain_key
from tests.drafter.helpers import HIDDEN, KINDS, VOCAB, tiny_model
from tests.recorders import FakeRecorder


def pair(
    kind: str, recorder: FakeRecorder | None, dtype: torch.dtype = torch.float64, head_dim: int = 8, **changes: Any
) -> tuple[BlockDrafter, BlockDrafter]:
    """The same network twice: forwards with masks, forwards over slots."""
    settings = DraftSettings(**{"node_budget": 30, "blocks": 5 if kind == "eagle3" else 3, "leaf_cap": 6} | changes)
    masks = BlockDrafter(tiny_model(dtype=dtype, head_dim=head_dim, **KINDS[kind]), settings, by_slot=False)
    slots = BlockDrafter(masks.model, settings, by_slot=True)
    assert masks.by_slot is None and slots.by_slot is not None
    if recorder is not None:
        kept: dict[int, BlockGraphs] = {}

        def recorded(cache: DrafterCache) -> BlockGraphs:
            return kept.setdefault(id(cache), BlockGraphs(slots.device, len(cache.positions), recorder))

        slots.by_slot.graphs, slots.by_slot.graphs_over = True, recorded  # type: ignore[method-assign]
    return masks, slots


def assert_same(one: DraftTree, other: DraftTree) -> None:
    for name in DraftTree.__dataclass_fields__:
        own, others = getattr(one, name), getattr(other, name)
        torch.testing.assert_close(own, others, rtol=1e-6 if own.dtype == torch.float64 else 1e-4, atol=1e-5)


def cycles(drafters: tuple[BlockDrafter, BlockDrafter], noisy: bool, seed: int = 0) -> None:
    """Some cycles of four requests, not all of them in each, with up to three new positions, or none."""
    generator = torch.Generator().manual_seed(seed)
    params = [SamplingParams(temperature=t, top_p=0.9, seed=i) for i, t in enumerate((0.0, 0.7, 1.0, 1.3))]
    caches = [drafter.new_cache(4, 40) for drafter in drafters]
    noises = [NoiseWindow(4, drafters[0].max_depth + 1, VOCAB) if noisy else None for _ in drafters]
    for cache in caches:
        for slot, domain in enumerate(("python", "", "cpp", "python")):
            cache.reset(slot, domain)
    for slots, counts in (
        ([0, 1, 2, 3], [3, 1, 0, 2]), ([2, 0, 1], [1, 2, 1]), ([3], [1]), ([0, 1, 2, 3], [1, 1, 1, 1]),
        ([1, 3, 2], [2, 3, 1]), ([0, 2], [4, 1]),
    ):  # fmt: skip
        batch, width = len(slots), max(counts)
        features = torch.randn(batch, width, 3 * HIDDEN, generator=generator, dtype=drafters[0].dtype)
        tokens = torch.randint(0, VOCAB, (batch, width), generator=generator)
        roots = torch.randint(0, VOCAB, (batch,), generator=generator)
        sampling = SamplingBatch.of([params[slot] for slot in slots])
        drafts = []
        for drafter, cache, noise in zip(drafters, caches, noises, strict=True):
            if noise is not None:
                first = [cache.positions[s] + c + 1 for s, c in zip(slots, counts, strict=True)]
                noise.advance(slots, first, [params[s].seed for s in slots], [0] * batch)
            new = NewPositions(features.clone(), tokens.clone(), list(counts))
            drafts.append(drafter.draft(cache, slots, new, roots, sampling, noise))
        assert_same(drafts[0].tree, drafts[1].tree)
        torch.testing.assert_close(drafts[0].offers.parent_row, drafts[1].offers.parent_row)
        assert caches[0].positions == caches[1].positions and caches[0].rows == caches[1].rows
        assert caches[1].keys.isfinite().all()
    width = drafters[0].model.config.num_slots
    for slot, count in enumerate(caches[0].rows):
        torch.testing.assert_close(
            caches[0].keys[:, slot, :, : count * width], caches[1].keys[:, slot, :, : count * width]
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("noisy", [False, True])
def test_the_same_trees_and_cache(kind: str, recorded: bool, noisy: bool) -> None:
    recorder = FakeRecorder()
    cycles(pair(kind, recorder if recorded else None), noisy)
    assert (recorder.replayed > recorder.recorded > 0) == recorded


@pytest.mark.skipif(not native_available(), reason="native operations were not built")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noisy", [False, True])
def test_whole_native_layers_draft_the_same(kind: str, noisy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    drafters = pair(kind, None, dtype=torch.float32, head_dim=16)
    assert BlockDrafter(drafters[0].model, drafters[0].settings).by_slot is not None, "float32 on a CPU goes by slot"
    calls: list[int] = []
    layer, stack = whole_layers.slot_layer, LayerStack.__call__
    monkeypatch.setattr(whole_layers, "slot_layer", lambda *a, **k: calls.append(1) or layer(*a, **k))
    monkeypatch.setattr(LayerStack, "__call__", lambda *a, **k: calls.append(1) or stack(*a, **k))
    cycles(drafters, noisy)
    assert bool(calls) == (kind != "parallel"), "parallel heads have no layers"


@pytest.mark.skipif(not native_available(), reason="native operations were not built")
@pytest.mark.parametrize(
    "written",
    ["input_layer.position_queries", "input_layer.query_norm", "input_layer.fuse", "layers.1.mlp.up_proj",
     "layers.0.input_layernorm", ""],
)  # fmt: skip
def test_weights_that_are_written_to_are_noticed(written: str) -> None:
    _, used = pair("specblock", None, dtype=torch.float32, head_dim=16)
    cycles((used, used), noisy=True)
    with torch.inference_mode(), torch.no_grad():
        for name, parameter in used.model.named_parameters():
            if name.startswith(written):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    fresh = tiny_model(dtype=torch.float32, head_dim=16, **KINDS["specblock"])
    fresh.load_state_dict(used.model.state_dict())
    cycles((BlockDrafter(fresh, used.settings, by_slot=False), used), noisy=True, seed=1)


@pytest.mark.skipif(not native_available(), reason="native operations were not built")
def test_rounding_rows_holds_from_the_next_block_on_and_can_be_taken_back() -> None:
    masks, slots = pair("specblock", None, dtype=torch.float32, head_dim=16)
    round_weights(slots.model)  # both drafters have it; only such weights are multiplied in bfloat16
    cycles((masks, slots), noisy=True)
    layer = slots.model.layers[0].block
    slots.model.round_rows()
    with torch.inference_mode():
        assert layer.weights()[1].up.coarse and layer.weights() is layer.weights()
    cycles((masks, slots), noisy=True, seed=1)
    with slots.model.coarsely():
        pass
    assert all(linear.coarse for linear in slots.model._linears())
    slots.model.round_rows(False)
    cycles((masks, slots), noisy=True, seed=2)
    with torch.inference_mode():
        assert not layer.weights()[1].up.coarse


def test_a_network_that_was_cast_goes_on_without_whole_layers() -> None:
    masks, slots = pair("specblock", None, dtype=torch.float32, head_dim=16)
    cycles((masks, slots), noisy=True)
    slots.model.to(torch.float64)  # both drafters have it
    cycles((masks, slots), noisy=True, seed=1)


def test_heads_that_native_layers_do_not_take_go_without() -> None:
    drafters = pair("specblock", None, dtype=torch.float32, head_dim=8)
    assert BlockDrafter(drafters[0].model, drafters[0].settings).by_slot is None
    cycles(drafters, noisy=True)


def test_the_same_with_the_published_refresh() -> None:
    cycles(pair("specblock", FakeRecorder(), published_refresh=True), noisy=False)


def test_new_weights_in_place_and_a_bias_need_no_new_recording_of_what_they_do_not_change() -> None:
    recorder = FakeRecorder()
    drafters = pair("specblock", recorder)
    cycles(drafters, noisy=False)
    with torch.no_grad():
        for parameter in drafters[0].model.parameters():  # both drafters have it
            parameter.mul_(1.1)
    places = drafters[0].model.draft_ids.data_ptr(), drafters[0].model.to_draft.data_ptr()
    drafters[0].model.refresh_vocabulary()
    assert places == (drafters[0].model.draft_ids.data_ptr(), drafters[0].model.to_draft.data_ptr())
    cycles(drafters, noisy=False, seed=1)
    bias = drafters[0].model.token_bias
    bias.table[bias.row(domain_key("python"))] = torch.linspace(-3, 3, VOCAB, dtype=bias.table.dtype)
    cycles(drafters, noisy=False, seed=2)


def test_what_cannot_be_recorded_runs_without_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    recorder = FakeRecorder(fail_at=2)
    drafters = pair("specblock", recorder)
    cycles(drafters, noisy=True)
    assert recorder.recorded == 2
    assert [r.getMessage() for r in caplog.records if "no CUDA graph" in r.getMessage()] == [
        "no CUDA graph for a drafter's block, going on without more of them: operation not permitted"
    ]


@pytest.mark.skipif(not native_available(), reason="native operations were not built")
@pytest.mark.parametrize("kind", ["specblock", "eagle3"])
def test_prompts_of_any_length_are_absorbed_alike(kind: str) -> None:
    """Side by side and one by one; up to the rounding of context, as with masks."""
    masks, slots = pair(kind, None, dtype=torch.float32, head_dim=16)
    generator = torch.Generator().manual_seed(0)
    counts = [30, 1, 0, 17]
    features = torch.randn(4, 30, 3 * HIDDEN, generator=generator)
    tokens = torch.randint(0, VOCAB, (4, 30), generator=generator)
    caches = [drafter.new_cache(4, 40) for drafter in (masks, slots, slots)]
    u = [
        d.refresh(c, [0, 1, 2, 3], NewPositions(features, tokens, counts))
        for d, c in zip((masks, slots), caches[:2], strict=True)
    ]
    for slot, count in enumerate(counts):
        one = NewPositions(
            features[slot : slot + 1, : max(1, count)], tokens[slot : slot + 1, : max(1, count)], [count]
        )
        alone = slots.refresh(caches[2], [slot], one)
        if count:
            assert torch.equal(alone[0], u[1][slot])
            torch.testing.assert_close(u[1][slot], u[0][slot], rtol=0.05, atol=0.05)
    assert caches[0].rows == caches[1].rows == caches[2].rows == counts
    assert torch.equal(caches[1].keys, caches[2].keys) and torch.equal(caches[1].values, caches[2].values)
    width = masks.model.config.num_slots
    for slot, count in enumerate(counts):
        stored = [cache.keys[:, slot, :, : count * width] for cache in caches[:2]]
        torch.testing.assert_close(*stored, rtol=0.05, atol=0.05)


def test_a_cache_without_room_is_noticed() -> None:
    _, slots = pair("specblock", None, dtype=torch.float32, head_dim=16)
    cache = slots.new_cache(1, 5)
    new = NewPositions(torch.zeros(1, 8, 3 * HIDDEN), torch.zeros(1, 8, dtype=torch.int64), [8])
    with pytest.raises(AssertionError, match="overflow"):
        slots.refresh(cache, [0], new)

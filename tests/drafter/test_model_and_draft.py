"""Training and decode-time forwards agree, the refreshed cache equals a fresh one, trees keep their invariants."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specblock.drafter.config import DrafterConfig, DraftSettings
from specblock.drafter.draft import BlockDrafter
from specblock.drafter.expand import Leaves
from specblock.drafter.interface import NewPositions
from specblock.drafter.kv_cache import DrafterCache
from specblock.drafter.loss import later_block_mask, train_blocks
from specblock.drafter.model import SpecBlockModel, rank_class
from specblock.drafter.window import Window, collate
from tests.drafter.helpers import KINDS, VOCAB, noise_for, random_window, sampling_of, tiny_config, tiny_model


def positions_of(window: Window, start: int, end: int) -> NewPositions:
    return NewPositions(
        window.features[None, start:end], window.tokens[None, start + 1 : end + 1].long(), [end - start]
    )


def fresh(drafter: BlockDrafter, window: Window, upto: int) -> tuple[DrafterCache, torch.Tensor]:
    cache = drafter.new_cache(1, window.tokens.shape[0])
    hidden = drafter.refresh(cache, [0], positions_of(window, 0, upto))
    return cache, hidden


@pytest.mark.parametrize("kind", KINDS)
def test_block_1_training_forward_equals_decoding(kind: str) -> None:
    model, window = tiny_model(**KINDS[kind]), random_window(1)
    with torch.no_grad():
        trained = train_blocks(model, collate([window]), [])[0][0]
    drafter = BlockDrafter(model, DraftSettings())
    cache = drafter.new_cache(1, window.tokens.shape[0])
    at = 0
    for step in (3, 1, 2, 1, 5):
        hidden = drafter.refresh(cache, [0], positions_of(window, at, at + step))
        at += step
        torch.testing.assert_close(hidden[0], trained[at - 1 : at], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "consumed"),
    [("specblock", c) for c in ([1], [3], [4], [2, 1], [4, 3], [1, 4])] + [("eagle3", [1]), ("eagle3", [1] * 6)],
)
def test_later_blocks_training_forward_equals_decoding(kind: str, consumed: list[int]) -> None:
    """A leaf at slot M-1 with the true token is what training sees when M slots are consumed."""
    model, window = tiny_model(**KINDS[kind]), random_window(2, prompt_tokens=6, generated=30)
    with torch.no_grad():
        trained = train_blocks(model, collate([window]), consumed)
    width = model.config.num_slots
    for position in (4, 9, 15):
        drafter = BlockDrafter(model, DraftSettings(blocks=1 + len(consumed), leaf_cap=2))
        cache, hidden = fresh(drafter, window, position + 1)
        hidden = hidden[:, -1:, :, :]
        seen = torch.zeros(1, 1, width + drafter.scratch_rows, dtype=torch.bool)
        offset = 0
        for block, count in enumerate(consumed, start=1):
            offset += count
            first_row = 0 if block == 1 else width + (block - 2) * 2 * width
            seen = seen.clone()
            seen[0, 0, first_row : first_row + count] = True
            token = window.tokens[position + 1 + offset].long().view(1, 1)
            leaves = Leaves(
                node=token, depth=torch.tensor([[offset]]), token=token, score=torch.zeros(1, 1),
                valid=torch.ones(1, 1, dtype=torch.bool), hidden=hidden[:, :, count - 1], seen=seen,
            )  # fmt: skip
            with torch.no_grad():
                hidden = drafter._masks.later(cache, [0], torch.tensor([0]), leaves, drafter._scratch_start(block))
            torch.testing.assert_close(hidden[0, 0], trained[block][0, position], atol=1e-5, rtol=1e-5)


def test_published_mask_shows_earlier_positions_of_the_current_block() -> None:
    later = torch.arange(3)[None]
    local, published = (later_block_mask(later, 3, 4, [2], flag)[0] for flag in (False, True))
    assert not (local & ~published).any()
    extra = (published & ~local)[:, 12:]
    row = torch.arange(12)
    assert torch.equal(extra, (row[None] // 4) < (row[:, None] // 4))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=6), st.integers(0, 1000))
def test_refresh_after_any_acceptance_equals_recomputing(steps: list[int], seed: int) -> None:
    """Cycles that accepted 0, 1 or many drafts, with later blocks scribbling over the scratch rows in between."""
    model = tiny_model()
    window = random_window(seed, prompt_tokens=4, generated=40)
    drafter = BlockDrafter(model, DraftSettings(leaf_cap=3))
    cache = drafter.new_cache(1, window.tokens.shape[0])
    at = 0
    for step in steps:
        noise = noise_for([window], [at + step + 1], drafter.max_depth)
        drafter.draft(cache, [0], positions_of(window, at, at + step), window.tokens[at + step].long().view(1),
                      sampling_of([window]), noise)  # fmt: skip
        at += step
    clean, _ = fresh(drafter, window, at)
    rows = at * model.config.num_slots
    assert cache.positions == clean.positions == [at]
    torch.testing.assert_close(cache.keys[:, :, :, :rows], clean.keys[:, :, :, :rows], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache.values[:, :, :, :rows], clean.values[:, :, :, :rows], atol=1e-5, rtol=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 12), st.integers(1, 40), st.booleans(),
    st.sampled_from([(2, 4, 6, 4), (2, 4, 10, 0), (1, 1, 1, 1)]), st.sampled_from(sorted(KINDS)),
)  # fmt: skip
def test_trees_keep_their_invariants(
    seed: int, blocks: int, leaf_cap: int, budget: int, shared: bool, fan_out: tuple[int, ...], kind: str
) -> None:
    drafter = BlockDrafter(
        tiny_model(seed % 5, **KINDS[kind]),
        DraftSettings(blocks=blocks, leaf_cap=leaf_cap, node_budget=budget, shared_noise=shared, fan_out=fan_out),
    )
    windows = [random_window(seed + i, prompt_tokens=3 + i, temperature=float(i % 2)) for i in range(3)]
    cache = drafter.new_cache(3, 40)
    ends = [w.prompt_tokens - 1 for w in windows]
    features = torch.zeros(3, max(ends), windows[0].features.shape[1])
    tokens = torch.zeros(3, max(ends), dtype=torch.int64)
    for i, (w, end) in enumerate(zip(windows, ends, strict=True)):
        features[i, :end], tokens[i, :end] = w.features[:end], w.tokens[1 : end + 1]
    roots = torch.stack([w.tokens[end].long() for w, end in zip(windows, ends, strict=True)])
    noise = noise_for(windows, [end + 1 for end in ends], drafter.max_depth) if shared else None
    new = NewPositions(features, tokens, ends)
    tree = drafter.draft(cache, [0, 1, 2], new, roots, sampling_of(windows), noise).tree
    tree.check()
    assert torch.equal(tree.token[:, 0], roots)
    assert int(tree.size.max()) <= budget + 1
    assert int(tree.depth.max()) <= drafter.max_depth
    assert int(tree.token.max()) < VOCAB


@pytest.mark.parametrize("kind", KINDS)
def test_batched_drafting_equals_single(kind: str) -> None:
    drafter = BlockDrafter(tiny_model(dtype=torch.float64, **KINDS[kind]), DraftSettings())
    windows = [random_window(i, prompt_tokens=4 + 3 * i) for i in range(3)]
    for w in windows:
        assert w.prompt_tokens > 1
    alone = []
    for w in windows:
        cache = drafter.new_cache(1, 40)
        end = w.prompt_tokens - 1
        new = NewPositions(w.features[None, :end].double(), w.tokens[None, 1 : end + 1].long(), [end])
        alone.append(drafter.draft(cache, [0], new, w.tokens[end].long().view(1), sampling_of([w]),
                                   noise_for([w], [end + 1], drafter.max_depth)).tree)  # fmt: skip
    ends = [w.prompt_tokens - 1 for w in windows]
    features = torch.zeros(3, max(ends), windows[0].features.shape[1], dtype=torch.float64)
    tokens = torch.zeros(3, max(ends), dtype=torch.int64)
    for i, (w, end) in enumerate(zip(windows, ends, strict=True)):
        features[i, :end], tokens[i, :end] = w.features[:end].double(), w.tokens[1 : end + 1]
    roots = torch.stack([w.tokens[end].long() for w, end in zip(windows, ends, strict=True)])
    noise = noise_for(windows, [end + 1 for end in ends], drafter.max_depth)
    new = NewPositions(features, tokens, ends)
    together = drafter.draft(drafter.new_cache(3, 40), [0, 1, 2], new, roots, sampling_of(windows), noise).tree
    for i, tree in enumerate(alone):
        size = int(tree.size[0])
        assert size == int(together.size[i])
        assert torch.equal(tree.token[0, :size], together.token[i, :size])
        assert torch.equal(tree.parent[0, :size], together.parent[i, :size])


def test_request_without_any_position_gets_its_root_only() -> None:
    drafter = BlockDrafter(tiny_model(), DraftSettings(shared_noise=False))
    window = random_window(3)
    new = NewPositions(torch.zeros(1, 1, window.features.shape[1]), torch.zeros(1, 1, dtype=torch.int64), [0])
    tree = drafter.draft(drafter.new_cache(1, 8), [0], new, torch.tensor([7]), sampling_of([window]), None).tree
    assert tree.size.tolist() == [1] and int(tree.token[0, 0]) == 7


def test_draft_vocabulary_maps_to_target_ids() -> None:
    kept = torch.arange(0, VOCAB, 2)
    model = tiny_model(draft_vocab_size=VOCAB // 2)
    model.set_vocabulary(kept)
    assert torch.equal(torch.arange(VOCAB // 2) + model.d2t, kept)
    assert torch.equal(model.t2d.nonzero().squeeze(1), kept)
    drafter, window = BlockDrafter(model, DraftSettings()), random_window(5)
    tree = drafter.draft(drafter.new_cache(1, 30), [0], positions_of(window, 0, 4), window.tokens[4].long().view(1),
                         sampling_of([window]), noise_for([window], [5], drafter.max_depth)).tree  # fmt: skip
    assert (tree.token[0, 1 : int(tree.size[0])] % 2 == 0).all()


def test_shared_noise_with_the_targets_own_law_accepts_the_first_token() -> None:
    """If q equals p, arg-max(log q + Gumbel) is the target's choice, so rank 1 of slot 0 must always hit."""
    from specblock.cuda_ext.noise import gumbel
    from specblock.cuda_ext.ranking import perturbed
    from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams

    params = [SamplingParams(temperature=0.9, top_p=0.9, seed=i) for i in range(200)]
    batch = SamplingBatch.of(params)
    logits = torch.randn(200, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    zero = torch.zeros(200, dtype=torch.int64)
    noise = gumbel(batch.seed, zero, zero + 7, VOCAB)
    from specblock.cuda_ext.sampling import processed_log_probs

    target = (processed_log_probs(logits, batch) + noise).argmax(-1)
    top = logits.topk(20, dim=-1).values
    drafted = perturbed(logits, top, noise.float(), batch, 0.5).argmax(-1)
    assert (target == drafted).float().mean() > 0.99


def test_rank_classes_follow_the_table() -> None:
    ranks = torch.tensor([1, 2, 4, 5, 10, 11, 500])
    assert rank_class(ranks).tolist() == [0, 1, 1, 2, 2, 3, 3]


def test_wrong_shapes_and_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit the target"):
        SpecBlockModel(tiny_config(), torch.zeros(VOCAB + 1, 32))
    with pytest.raises(ValueError, match="feature_layers"):
        tiny_config(feature_layers=(2, 1, 0))
    with pytest.raises(ValueError, match=r"drafter\.leaf_cap"):
        DraftSettings(leaf_cap=0)
    with pytest.raises(ValueError, match="not a drafter"):
        DrafterConfig.from_json({"architectures": ["LlamaForCausalLM"]})

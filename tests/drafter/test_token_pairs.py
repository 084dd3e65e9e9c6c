"""Counting which token follows which: the table, its gains, and what drafting has of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from specblock.drafter.checkpoint import load_drafter, load_weights, save_drafter
from specblock.drafter.config import DraftSettings
from specblock.drafter.draft import BlockDrafter
from specblock.drafter.loss import LossSettings
from specblock.drafter.replay import acceptance_length, replay
from specblock.drafter.token_pairs import TokenPairs
from specblock.drafter.train import TrainSettings
from specblock.drafter.update import counts_beside, update_run
from specblock.drafter.window import Window
from tests.drafter.helpers import KINDS, VOCAB, random_window, tiny_model

SOFT = 2e-3  # counts are kept in parts of an occurrence


def counted(windows: Sequence[Window]) -> dict[tuple[int, int], float]:
    """The definition, pair by pair."""
    found: dict[tuple[int, int], float] = defaultdict(float)
    for window in windows:
        tokens, prompt = window.tokens.tolist(), window.prompt_tokens
        for choice in range(window.num_generated):
            law = zip(window.top_ids[choice].tolist(), window.top_log_probs[choice].exp().tolist(), strict=True)
            for after, probability in law:
                found[tokens[prompt - 1 + choice], after] += probability
    return found


def table(pairs: TokenPairs) -> dict[tuple[int, int], float]:
    starts = pairs.starts.tolist()
    return {
        (before, int(pairs.tokens[place])): int(pairs.counts[place]) / 1024
        for before in range(len(starts) - 1)
        for place in range(starts[before], starts[before + 1])
    }


def test_choices_count_by_their_laws_and_what_users_wrote_does_not() -> None:
    windows, pairs = [random_window(1), random_window(2, 1, 9)], TokenPairs(VOCAB, 4096)
    pairs.count(windows)
    expected, found = counted(windows), table(pairs)
    assert found.keys() <= expected.keys()
    assert all(found.get(pair, 0.0) == pytest.approx(count, abs=SOFT) for pair, count in expected.items())


def test_older_counts_make_room_for_newer_ones_but_half_of_them_stays() -> None:
    for many, kept in ((4, 0.5), (1, 0.75)):
        pairs, first, second = TokenPairs(VOCAB, 4096), [random_window(n) for n in range(4)], random_windows(many)
        pairs.count(first)
        pairs.count(second)
        older, newer, found = counted(first), counted(second), table(pairs)
        for pair in older.keys() | newer.keys():
            expected = kept * older.get(pair, 0.0) + newer.get(pair, 0.0)
            assert found.get(pair, 0.0) == pytest.approx(expected, abs=0.1 * older.get(pair, 0.0) + 2 * SOFT)
    before = pairs.occurrences
    pairs.count([])
    assert pairs.occurrences == before


def random_windows(many: int) -> list[Window]:
    return [random_window(10 + n) for n in range(many)]


@given(seed=st.integers(0, 10_000), room=st.sampled_from([1, 30, 400, 4096]))
@settings(max_examples=30, deadline=None)
def test_what_follows_a_token_is_a_law(seed: int, room: int) -> None:
    pairs = TokenPairs(VOCAB, room)
    pairs.count([random_window(seed + i) for i in range(4)])
    assert int(pairs.starts[-1]) <= room
    law = pairs.unigram.double() / 1024 + 0.5
    law = law / law.sum()
    everyone = torch.arange(VOCAB)
    for before in range(VOCAB):
        gains = pairs.known.of(torch.full((VOCAB,), before), everyone).double()
        # What the target gave to tokens that are not recorded with a choice is spread over the rest.
        assert (law * gains.exp()).sum() == pytest.approx(1.0, abs=0.02)


def test_with_little_room_the_most_frequent_pairs_stay() -> None:
    whole, little = TokenPairs(VOCAB, 4096), TokenPairs(VOCAB, 20)
    for pairs in (whole, little):
        pairs.count([random_window(seed) for seed in range(6)])
    expected = sorted(table(whole).values(), reverse=True)[:20]
    assert sorted(table(little).values(), reverse=True) == expected


def markov_windows(count: int) -> list[Window]:
    """Conversations of a target that says 3 * t + 1 behind t, nearly always."""
    made = []
    for seed in range(count):
        window = random_window(seed, generated=40)
        tokens = window.tokens.clone()
        for place in range(1, len(tokens)):
            tokens[place] = (3 * tokens[place - 1] + 1) % VOCAB
        ids, log_probs = window.top_ids.clone(), torch.full_like(window.top_log_probs, -9.0)
        said = tokens[window.prompt_tokens :]
        ids[:] = (said[:, None] + torch.arange(ids.shape[1])) % VOCAB
        log_probs[:, 0] = -0.01
        made.append(replace(window, tokens=tokens, top_ids=ids, top_log_probs=log_probs))
    return made


def test_drafts_hang_together_once_pairs_are_counted() -> None:
    model = tiny_model(7)
    windows = markov_windows(24)
    how = DraftSettings(node_budget=40, blocks=1, beam=60, rank_head=False)
    before = acceptance_length(replay(BlockDrafter(model, how), windows[16:]))
    model.token_pairs.count(windows[:16])
    after = acceptance_length(replay(BlockDrafter(model, how), windows[16:]))
    off = acceptance_length(replay(BlockDrafter(model, replace(how, pair_weight=0.0)), windows[16:]))
    assert off == before and after > 1.015 * before  # of a drafter whose first slots are wrong as a rule


def test_pairs_travel_with_the_weights_and_old_drafters_have_none(tmp_path: Path) -> None:
    model, embedding = tiny_model(), tiny_model().embedding
    save_drafter(model, tmp_path / "old")
    assert not any(name.startswith("token_pairs.") for name in load_file(tmp_path / "old" / "model.safetensors"))
    assert not load_drafter(tmp_path / "old", embedding, dtype=torch.float32).token_pairs.used
    model.token_pairs.count([random_window(1)])
    save_drafter(model, tmp_path / "new")
    again = load_drafter(tmp_path / "new", embedding, dtype=torch.bfloat16).token_pairs
    for name in ("starts", "tokens", "gains", "rest", "keys"):
        assert torch.equal(getattr(again.known, name), getattr(model.token_pairs.known, name)), name
    assert again.known.gains.dtype == torch.float32, "no cast of the network rounds them"


@pytest.mark.parametrize(
    ("damage", "value"), [("starts", 1 << 20), ("tokens", 1 << 20), ("tokens", -1), ("counts", -5)]
)
def test_a_damaged_table_is_refused_before_anything_is_loaded(tmp_path: Path, damage: str, value: int) -> None:
    model = tiny_model()
    model.token_pairs.count([random_window(1)])
    save_drafter(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"token_pairs.{damage}"][3] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="token_pairs: the table is damaged"):
        load_drafter(tmp_path, model.embedding, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="token_pairs: the table is damaged"):
        load_weights(model, tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}, "some")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_gains_stay_in_their_memory_for_recorded_graphs() -> None:
    model = tiny_model()
    where = model.token_pairs.known.gains.data_ptr()
    model.token_pairs.count([random_window(1)])
    assert model.token_pairs.known.gains.data_ptr() == where


@pytest.mark.parametrize("kind", ["eagle3", "parallel"])
def test_slots_that_follow_none_of_their_block_have_no_table(kind: str) -> None:
    model = tiny_model(**KINDS[kind])
    assert model.token_pairs.tokens.shape[0] == 0 and "pairs" not in model.parameter_groups()
    with pytest.raises(ValueError, match="predicts no slot behind another"):
        update_run(model, training())


def training(*patterns: str) -> TrainSettings:
    return TrainSettings(steps=4, batch_windows=2, patterns=patterns or ("token_pairs.*",), loss=LossSettings())


def test_an_update_that_counts_moves_nothing_else_and_counts_each_conversation_once() -> None:
    model, windows = tiny_model(), [random_window(seed) for seed in range(4)]
    weights = {name: value.clone() for name, value in model.named_parameters()}
    run = update_run(model, training())
    for batch, _ in zip(run.batches(windows), range(6), strict=False):
        run.step(batch)
    assert run.done == 6 and run.positions == sum(window.num_generated for window in windows)
    assert all(torch.equal(weights[name], value) for name, value in model.named_parameters())
    once = TokenPairs(VOCAB, 4096)
    once.count(windows)
    assert torch.allclose(model.token_pairs.counts, once.counts, atol=len(windows)), "but for rounding"


def test_which_updates_count_beside() -> None:
    assert counts_beside(("*",)) and counts_beside(("*head*", "token_pairs.*"))
    assert not counts_beside(("*head*", "norm.*")) and not counts_beside(("token_pairs.*",))

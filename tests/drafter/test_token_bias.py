"""Counting tokens instead of training: definition, effect, checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specblock.drafter.checkpoint import load_drafter, save_drafter
from specblock.drafter.config import DraftSettings
from specblock.drafter.counting import TokenBiasRun, expected_counts
from specblock.drafter.draft import BlockDrafter
from specblock.drafter.loss import LossSettings, train_blocks, training_loss
from specblock.drafter.replay import acceptance_length, replay
from specblock.drafter.token_bias import MAX_DOMAINS, TokenBias, domain_key
from specblock.drafter.train import TrainSettings
from specblock.drafter.update import update_run
from specblock.drafter.window import Window, collate
from tests.drafter.helpers import KINDS, random_window, tiny_model

COMMON = 7  # the token that the target of these tests says half of the time


def foreign_window(seed: int) -> Window:
    """A conversation in which every other token is one that no drafter here expects."""
    window = random_window(seed, generated=30)
    tokens = window.tokens.clone()
    tokens[::2] = COMMON
    ids, log_probs = window.top_ids.clone(), window.top_log_probs.clone()
    ids[:, 0] = torch.where(ids[:, 0] == COMMON, 0, ids[:, 0])
    log_probs[:, 1:] -= 1.0
    ids[ids == COMMON] = 1
    ids[:, 0], log_probs[:, 0] = COMMON, torch.log(torch.tensor(0.5)).to(log_probs.dtype)
    return replace(window, tokens=tokens, top_ids=ids, top_log_probs=log_probs)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_every_slot_that_is_reached(kind: str) -> None:
    model = tiny_model(draft_vocab_size=40, **KINDS[kind])
    model.set_vocabulary(torch.arange(0, 40))
    windows, bias = [random_window(1), random_window(2, 3, 9)], torch.randn(2, 40)
    batch = collate(windows)
    with torch.no_grad():
        target, draft = expected_counts(model, batch, bias)
        hidden = train_blocks(model, batch, [])[0]
        slow_target, slow_draft = torch.zeros(2, 40), torch.zeros(2, 40)
        for row, window in enumerate(windows):
            for position in range(window.features.shape[0]):
                reached = 1.0
                for slot in range(hidden.shape[2]):
                    choice = position + slot + 2 - window.prompt_tokens  # of the token at position + slot + 2
                    known = [i for i, token in enumerate(window.top_ids[choice % window.num_generated]) if token < 40]
                    if not 0 <= choice < window.num_generated or window.top_ids[choice][0] >= 40:
                        break  # nothing after a slot without a label is reached
                    q = torch.softmax(model.norm(hidden[row, position, slot]) @ model.lm_head.weight.T + bias[row], -1)
                    law = torch.softmax(window.top_log_probs[choice][known].float(), dim=-1)
                    slow_draft[row] += reached * q
                    for i, share in zip(known, law, strict=True):
                        slow_target[row, window.top_ids[choice][i]] += reached * share
                    said = int(window.tokens[position + slot + 2])
                    place = window.top_ids[choice].tolist().index(said) if said in window.top_ids[choice] else -1
                    if place < 0 or said >= 40:
                        break
                    reached *= min(1.0, float(q[said] / window.top_log_probs[choice][place].float().exp()))
    torch.testing.assert_close(target, slow_target, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(draft, slow_draft, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_counting_brings_the_drafter_closer_and_moves_nothing_else(kind: str) -> None:
    windows = [foreign_window(i) for i in range(12)]
    model = tiny_model(**KINDS[kind])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = DraftSettings(blocks=1, node_budget=3)
    first = acceptance_length(replay(BlockDrafter(model, settings), windows))
    run = update_run(model, TrainSettings(steps=2, batch_windows=6, patterns=("token_bias.*",), learning_rate=1.0))
    for batch, _ in zip(run.batches(windows), range(2), strict=False):
        run.step(batch)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"token_bias.table", "token_bias.domains", "token_bias.stamps"}
    assert run.done == 2 and run.positions == sum(int(collate([w]).valid.sum()) for w in windows)
    bias = model.token_bias.of(collate(windows).domains)
    assert bias is not None and bias.argmax(dim=1).tolist() == [COMMON] * 12
    with torch.no_grad():
        target, draft = expected_counts(model, collate(windows), bias)
        _, as_before = expected_counts(model, collate(windows), torch.zeros_like(bias))
    assert (target - draft).abs().sum() < 0.75 * (target - as_before).abs().sum()
    assert acceptance_length(replay(BlockDrafter(model, settings), windows)) > first


def test_other_kinds_of_text_stay_as_they_are() -> None:
    model, settings = tiny_model(), DraftSettings()
    foreign = [replace(foreign_window(i), domain="cpp") for i in range(2)]
    usual = [replace(random_window(i), domain="python") for i in range(3)]
    before = replay(BlockDrafter(model, settings), usual)
    TokenBiasRun(model, 2, 1.0).step(foreign)
    assert replay(BlockDrafter(model, settings), usual) == before
    together = BlockDrafter(model, settings)
    assert replay(together, [*usual, *foreign])[:3] == before, "nor beside the other kind in one batch"


def test_training_goes_on_from_the_counted_bias() -> None:
    windows = [foreign_window(i) for i in range(2)]
    model = tiny_model()
    losses = []
    for _ in range(2):
        losses.append(float(training_loss(model, collate(windows), [], LossSettings()).draft))
        TokenBiasRun(model, 2, 1.0).step(windows)
    assert losses[1] < losses[0]


def test_pieces_count_as_the_whole_and_a_second_update_starts_where_the_first_ended() -> None:
    windows = [replace(foreign_window(i), domain="cpp") for i in range(4)]
    pieces, whole = (TokenBiasRun(tiny_model(), size, 1.0) for size in (2, 4))
    for run, steps in ((pieces, 2), (whole, 1)):
        for batch, _ in zip(run.batches(windows), range(steps), strict=False):
            run.step(batch)
    torch.testing.assert_close(pieces.model.token_bias.table, whole.model.token_bias.table)
    first = whole.model.token_bias.table.clone()
    again = TokenBiasRun(whole.model, 4, 1.0)
    again.step(windows)
    change = (again.model.token_bias.table - first).abs().max()
    assert 0 < change < 0.5 * first.abs().max(), "what was evened out is hardly moved again"


def test_a_share_takes_over_that_much() -> None:
    windows = [foreign_window(i) for i in range(2)]
    whole, half = (TokenBiasRun(tiny_model(), 2, share) for share in (1.0, 0.5))
    whole.step(windows)
    half.step(windows)
    torch.testing.assert_close(2 * half.model.token_bias.table, whole.model.token_bias.table)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="learning_rate is the share"):
            TokenBiasRun(tiny_model(), 2, share)


def test_it_is_not_mixed_with_training() -> None:
    with pytest.raises(ValueError, match="arm of its own"):
        update_run(tiny_model(), TrainSettings(steps=1, patterns=("token_bias.*", "lm_head.*")))


def test_rows_are_bounded_and_the_one_counted_longest_ago_gives_way() -> None:
    bias = TokenBias(5)
    keys = [domain_key(f"kind {i}") for i in range(MAX_DOMAINS + 1)]
    for key in keys[:-1]:
        bias.table[bias.row(key)] = 1.0
    bias.row(keys[0])  # counted again: now the second is the oldest
    newest = bias.row(keys[-1])
    assert [bias.of([key]) is not None for key in keys] == [number != 1 for number in range(len(keys))]
    assert not bias.table[newest].any() and not bias.table[0].any()
    assert bias.of([domain_key(""), domain_key("never seen")]) is None


def test_a_conversation_counts_once() -> None:
    windows = [foreign_window(1)]
    once, often = TokenBiasRun(tiny_model(), 1, 1.0), TokenBiasRun(tiny_model(), 1, 1.0)
    once.step(windows)
    for _ in range(6):
        often.step(windows)
    assert torch.equal(once.model.token_bias.table, often.model.token_bias.table)
    assert often.done == 6 and often.positions == once.positions


def test_checkpoints_carry_it_and_published_ones_do_without(tmp_path: Path) -> None:
    model = tiny_model()
    save_drafter(model, tmp_path / "published", torch.float32)
    assert not any("token_bias" in name for name in load_file(tmp_path / "published" / "model.safetensors"))
    TokenBiasRun(model, 1, 1.0).step([foreign_window(1)])
    save_drafter(model, tmp_path / "counted", torch.float32)
    loaded = load_drafter(tmp_path / "counted", model.embedding, dtype=torch.float32)
    key = collate([foreign_window(1)]).domains
    counted, again = model.token_bias.of(key), loaded.token_bias.of(key)
    assert counted is not None and again is not None and torch.equal(counted, again)
    bare = load_drafter(tmp_path / "published", model.embedding, dtype=torch.float32)
    assert bare.token_bias.of(key) is None

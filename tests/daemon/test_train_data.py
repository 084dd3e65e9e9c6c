"""Conversations for offline training: prompts labelled by the target itself, shards that an interruption keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specblock.daemon.collect import CollectSettings, Prompt, collect
from specblock.daemon.train_data import generate_shards, label_prompts
from specblock.drafter.dataset import load_windows
from specblock.drafter.window import Window, collate
from specblock.verifier.model import TargetModel

PROMPTS = [Prompt("python", "import os\n\ndef main("), Prompt("manual", "NAME\n     ls"), Prompt("python", "x")]
SETTINGS = CollectSettings(max_tokens=8, slots=3, seed=2)


@pytest.fixture(scope="module")
def target() -> TargetModel:
    return TargetModel.load("models/demo-target", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def windows(target: TargetModel) -> list[Window]:
    return [window for window, _ in collect(target, PROMPTS, SETTINGS, lambda: 0.0)]


def test_labels_of_a_prompt_are_the_laws_that_decoding_would_have_recorded(
    target: TargetModel, windows: list[Window]
) -> None:
    for w in windows:
        unlabelled = replace(
            w, prompt_tokens=w.tokens.shape[0], top_ids=w.top_ids[:0], top_log_probs=w.top_log_probs[:0]
        )
        labelled = label_prompts(target, [unlabelled])[0]
        torch.testing.assert_close(
            labelled.top_log_probs[w.prompt_tokens - 1 :].float(), w.top_log_probs.float(), atol=5e-3, rtol=0
        )
        assert torch.equal(labelled.top_ids[w.prompt_tokens - 1 :, 0], w.top_ids[:, 0])


def test_labelled_windows_train_on_every_position(target: TargetModel, windows: list[Window]) -> None:
    labelled = label_prompts(target, windows)
    for before, after in zip(windows, labelled, strict=True):
        assert after.num_generated == after.top_ids.shape[0] == before.tokens.shape[0] - 1
        assert torch.equal(after.top_ids[-before.num_generated :], before.top_ids)
    batch = collate(labelled)
    # Label j is the law of x_{j+2}; the last token was never consumed, so the law of x_{T+1} is the last one there is.
    assert [int(row.sum()) for row in batch.valid] == [w.tokens.shape[0] - 2 for w in windows]
    assert label_prompts(target, []) == []


def test_shards_are_labelled_and_an_existing_one_is_kept(target: TargetModel, tmp_path: Path) -> None:
    said: list[str] = []
    paths = generate_shards(target, PROMPTS, tmp_path, SETTINGS, said.append)
    assert len(said) == len(paths) == 1
    made = load_windows(paths[0])
    assert {w.prompt_tokens for w in made} == {1}
    assert generate_shards(target, PROMPTS, tmp_path, SETTINGS, said.append) == paths and len(said) == 1
    # Held-out conversations are replayed, so their prompts stay prompts.
    kept = generate_shards(target, PROMPTS, tmp_path / "held", replace(SETTINGS, heldout=True), said.append)
    assert {w.prompt_tokens for w in load_windows(kept[0])} == {len(target.tokenizer.encode(p.text)) for p in PROMPTS}

"""Generates training and held-out conversations in shards; an interrupted run goes on where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import torch

from specblock.daemon.collect import CollectSettings, Prompt, collect
from specblock.drafter.dataset import save_windows
from specblock.drafter.window import Window
from specblock.verifier.model import TargetModel
from specblock.verifier.result import topk_log_probs

SHARD_PROMPTS = 128


def generate_shards(
    target: TargetModel,
    prompts: Sequence[Prompt],
    directory: Path,
    settings: CollectSettings,
    say: Callable[[str], None],
) -> list[Path]:
    """Answers ``prompts`` in shuffled order, one shard file per 128 prompts; existing shards are kept.

    Args:
        target: the target model.
        prompts: what to answer; the order depends on ``settings.seed`` only.
        directory: where the shards go.
        settings: how the conversations are made.
        say: receives one progress line per shard.

    Returns:
        All shard files in order.
    """
    directory.mkdir(parents=True, exist_ok=True)
    order = list(prompts)
    Random(settings.seed).shuffle(order)
    paths = []
    for number, start in enumerate(range(0, len(order), SHARD_PROMPTS)):
        path = directory / f"shard-{number:04d}.safetensors"
        paths.append(path)
        if path.exists():
            continue
        begin = time.perf_counter()
        chunk = order[start : start + SHARD_PROMPTS]
        own = CollectSettings(
            max_tokens=settings.max_tokens,
            temperatures=settings.temperatures,
            top_p=settings.top_p,
            slots=settings.slots,
            seed=settings.seed * 100_003 + number,
            top_k=settings.top_k,
            heldout=settings.heldout,
        )
        windows = [window for window, _ in collect(target, chunk, own, time.time)]
        tokens = sum(w.num_generated for w in windows)
        save_windows(path, windows if settings.heldout else label_prompts(target, windows))
        speed = tokens / (time.perf_counter() - begin)
        say(f"{path.name}: {len(windows)} conversations, {tokens} tokens, {speed:.0f}/s")
    return paths


def label_prompts(target: TargetModel, windows: Sequence[Window]) -> list[Window]:
    """Windows whose prompts are labelled too: all but the first token counts as generated.

    One forward per prompt buys training positions that cost a decode cycle each when generated, on real text. Only for
    training: which drafts would have been accepted on a prompt is not defined, so such windows cannot be replayed.
    """
    if not windows:
        return []
    cache = target.new_cache(1, max(w.prompt_tokens for w in windows))
    labelled = []
    for w in windows:
        top = topk_log_probs(target.forward(cache, [0], w.tokens[None, : w.prompt_tokens].long()).logits[0, :-1])
        labelled.append(
            replace(
                w,
                prompt_tokens=1,
                top_ids=torch.cat([top.ids.cpu(), w.top_ids]),
                top_log_probs=torch.cat([top.log_probs.to(w.top_log_probs.dtype).cpu(), w.top_log_probs]),
            )
        )
    return labelled

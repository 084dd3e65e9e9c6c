"""Generates training and held-out conversations in shards; an interrupted run goes on where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from specblock.daemon.collect import CollectSettings, Prompt, collect
from specblock.drafter.dataset import save_windows
from specblock.verifier.model import TargetModel

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
        save_windows(path, windows)
        tokens = sum(w.num_generated for w in windows)
        speed = tokens / (time.perf_counter() - begin)
        say(f"{path.name}: {len(windows)} conversations, {tokens} tokens, {speed:.0f}/s")
    return paths

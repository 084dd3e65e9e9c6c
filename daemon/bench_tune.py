"""``specblockd bench tune``: each kind's best fixed tree on this machine, from training prompts only.

Every candidate answers the same prompts, interleaved; what counts is tokens per second at the headline setting. The
search is a coordinate descent over the steps of ``_GRID``, in their order. The fastest of many
noisy measurements looks faster than it is, so the best few meet again on other training prompts, and those decide.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from specblock.daemon import bench_rivals as rivals
from specblock.daemon.bench_rows import WayName
from specblock.daemon.bench_speed import interleaved
from specblock.daemon.bench_ways import Question, engine_way
from specblock.daemon.collect import Prompt, read_prompts
from specblock.daemon.facts import facts
from specblock.daemon.models import load_target, serving_dtype
from specblock.drafter.config import DraftSettings
from specblock.drafter.draft import BlockDrafter
from specblock.drafter.network import DraftNetwork
from specblock.drafter.precision import number_format
from specblock.verifier.model import TargetModel

_START = {
    "specblock": DraftSettings(blocks=1, leaf_cap=8, node_budget=7),
    "eagle3": DraftSettings(blocks=3, leaf_cap=2, node_budget=7, beam=4, fan_out=(1,), rank_head=False),
    "parallel": DraftSettings(blocks=1, leaf_cap=8, node_budget=7),
}
_RULE = "fan_out rule"
_BY_SCORE = (_RULE, ("rank head", 3, 4, 6, 10))
"""Fan-outs by rank class, or without the rank head, so many of every slot: their scores alone then decide."""
_GRID: dict[str, list[tuple[str, tuple[Any, ...]]]] = {
    "specblock": [
        ("blocks", (1, 2)), _BY_SCORE, ("node_budget", (4, 5, 7, 9, 12, 20)), ("leaf_cap", (2, 4, 8)),
        ("noise_scale", (0.7, 1.0, 1.4)), ("pair_weight", (0.3, 0.5, 0.7)),
    ],
    "eagle3": [
        ("blocks", (1, 2, 3, 4, 6)), ("leaf_cap", (1, 2, 4, 10)), ("beam", (2, 4, 10)),
        ("node_budget", (3, 5, 7, 12, 20, 31)),
        ("noise_scale", (0.7, 1.0, 1.4)),
    ],
    "parallel": [("node_budget", (2, 4, 7, 12, 20, 31)), ("noise_scale", (0.7, 1.0, 1.4))],
}  # fmt: skip
_FINALISTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSettings:
    """Which prompts (the directory holds DOMAIN.train.jsonl files), and which drafters (none named: every one)."""

    target: str = "models/demo-target"
    prompts: Path
    per_domain: int = 3
    domains: tuple[str, ...] = ("python", "cpp", "javascript", "manual")
    new_tokens: int = 64
    dtype: str = "auto"
    kinds: tuple[str, ...] = ()


def run(settings: TuneSettings, say: Callable[[str], None]) -> int:
    """Searches, prints every step and writes the result beside the drafters."""
    torch.set_num_threads(1)
    dtype = serving_dtype(settings.dtype, "cpu")
    target = load_target(settings.target, number_format(dtype, "cpu"), "cpu")
    rivals.warm(target)
    how = Question(temperature=1.0, top_p=0.95, new_tokens=settings.new_tokens)
    files = [read_prompts(settings.prompts / f"{domain}.train.jsonl") for domain in settings.domains]
    count = settings.per_domain
    prompts = [prompt for every in files for prompt in every[-count:]]
    others = [prompt for every in files for prompt in every[-2 * count : -count]]
    path = rivals.RIVALS / rivals.TUNED
    known = facts(dtype=dtype, prompts=len(prompts), new_tokens=settings.new_tokens, temperature=1.0, top_p=0.95)
    # Kinds that are not searched again keep what was found for them, with the facts of that search.
    kept: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"facts": {}, "settings": {}, "log": []}
    for kind, network in rivals.networks(target).items():
        if settings.kinds and kind not in settings.kinds:
            continue
        log: list[dict[str, Any]] = []
        chosen, tried_trees = _START[kind], dict[DraftSettings, float]()
        for name, values in _GRID[kind]:
            candidates = [_changed(chosen, name, value) for value in values]
            steps = _measured(target, network, candidates, prompts, how, files[0][0])
            for candidate, speed in steps:
                log.append({"kind": kind, "settings": asdict(candidate), "tokens_per_s": speed})
            tried_trees |= dict(steps)
            chosen, speed = max(steps, key=lambda step: step[1])
            tried = ", ".join(f"{value}: {s:.1f}" for value, (_, s) in zip(values, steps, strict=True))
            say(f"{kind}: {name} -> {values[candidates.index(chosen)]} ({tried} tokens/s)")
        finalists = sorted(tried_trees, key=tried_trees.__getitem__)[-_FINALISTS:]
        finals = _measured(target, network, finalists, others, how, files[0][0])
        chosen, speed = max(finals, key=lambda step: step[1])
        say(f"{kind}: {chosen} with {speed:.1f} tokens/s of {', '.join(f'{s:.1f}' for _, s in finals)}")
        log += [{"kind": kind, "settings": asdict(c), "tokens_per_s": s, "final": True} for c, s in finals]
        kept["facts"][kind], kept["settings"][kind] = known, rivals.settings_json(chosen)
        kept["log"] = [step for step in kept["log"] if step["kind"] != kind] + log
        path.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


def _changed(settings: DraftSettings, name: str, value: Any) -> DraftSettings:
    """One candidate of a step of the search."""
    if name != _RULE:
        return replace(settings, **{name: value})
    if value == "rank head":
        return settings
    return replace(settings, rank_head=False, beam=value, fan_out=tuple(min(n, value) for n in settings.fan_out))


def _measured(
    target: TargetModel,
    network: DraftNetwork,
    candidates: Sequence[DraftSettings],
    prompts: Sequence[Prompt],
    how: Question,
    warm_up: Prompt,
) -> list[tuple[DraftSettings, float]]:
    ways = {
        WayName(str(i)): engine_way(target, BlockDrafter(network, candidate)) for i, candidate in enumerate(candidates)
    }
    runs = interleaved(ways, prompts, how, warm_up)
    return [
        (candidate, sum(len(r.tokens) for r in own) / sum(r.seconds for r in own))
        for candidate, own in zip(candidates, runs.values(), strict=True)
    ]

"""``specblockd bench ablation``: SpecBlock with one thing changed at a time, against itself unchanged.

Everything is a fixed tree on the same weights, prompts and seeds, interleaved; the text is the same in every row, so
acceptance length and seconds are all that can differ. Ratios are paired over prompts with bootstrap intervals.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from specblock.daemon import bench_rivals as rivals
from specblock.daemon.bench_rows import WayName, acceptance_ratio, speed_ratio
from specblock.daemon.bench_speed import DOMAINS, SEED, interleaved
from specblock.daemon.bench_ways import Question, Run, Way, engine_way
from specblock.daemon.collect import read_prompts
from specblock.daemon.facts import facts
from specblock.daemon.models import load_target, serving_dtype
from specblock.daemon.resampling import Interval
from specblock.drafter.config import DraftSettings
from specblock.drafter.draft import BlockDrafter
from specblock.drafter.precision import number_format

BASE = "unchanged"
_EVERY_LEAF = 28  # block 1 has at most 10 + 3 * 6 nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class AblationSettings:
    """One comparison; ``prompts`` is a directory with DOMAIN.jsonl files, read from the end."""

    target: str = "models/demo-target"
    prompts: Path = Path("models/demo-prompts")
    per_domain: int = 6
    temperature: float = 1.0
    top_p: float = 0.95
    new_tokens: int = 64
    dtype: str = "auto"
    base: DraftSettings = field(default_factory=DraftSettings)
    out: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AblationRow:
    """One variant, all kinds of text pooled; ratios are to the unchanged drafter, intervals 95 % over prompts."""

    variant: str
    acceptance_length: float
    acceptance_ratio: float
    acceptance_ratio_interval: Interval
    tokens_per_s: float
    speed_ratio: float
    speed_ratio_interval: Interval
    drafting_ms_per_cycle: float
    verify_ms_per_cycle: float


def variants(base: DraftSettings) -> dict[str, DraftSettings]:
    """What is changed, by name; the first is ``base`` itself."""
    return {
        BASE: base,
        "published refresh": replace(base, published_refresh=True),
        "no rank head (fan-out 10 everywhere)": replace(base, rank_head=False),
        "no rank head (fan-out 4 everywhere)": replace(base, rank_head=False, beam=4, fan_out=(4,)),
        "no probability caps": replace(base, first_caps=(), other_caps=()),
        "no merge": replace(base, merge=False),
        "one block": replace(base, blocks=1),
        "4 leaves": replace(base, leaf_cap=4),
        "16 leaves": replace(base, leaf_cap=16),
        "all leaves": replace(base, leaf_cap=_EVERY_LEAF),
        "no shared noise": replace(base, shared_noise=False),
        "no token pairs": replace(base, pair_weight=0.0),
    }


def run(settings: AblationSettings, as_json: bool, say: Callable[[str], None]) -> int:
    """Measures and prints; returns the exit code."""
    torch.set_num_threads(1)
    dtype = serving_dtype(settings.dtype, "cpu")
    target = load_target(settings.target, number_format(dtype, "cpu"), "cpu")
    network = rivals.networks(target)["specblock"]
    rivals.warm(target)
    ways: dict[WayName, Way] = {
        WayName(name): engine_way(target, BlockDrafter(network, tree)) for name, tree in variants(settings.base).items()
    }
    how = Question(temperature=settings.temperature, top_p=settings.top_p, new_tokens=settings.new_tokens)
    runs: dict[WayName, list[Run]] = {name: [] for name in ways}
    for domain in DOMAINS:
        prompts = read_prompts(settings.prompts / f"{domain}.jsonl")
        for name, own in interleaved(ways, prompts[-settings.per_domain :], how, warm_up=prompts[0]).items():
            runs[name].extend(own)
        say(f"{domain} done")
    rows = [make_row(name.drafter, own, runs[WayName(BASE)]) for name, own in runs.items()]
    known = facts(
        dtype=dtype,
        new_tokens=settings.new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        prompts=settings.per_domain,
        seed=SEED,
    )
    result = {"facts": known, "base": rivals.settings_json(settings.base), "rows": [asdict(row) for row in rows]}
    if settings.out is not None:
        settings.out.mkdir(parents=True, exist_ok=True)
        (settings.out / "ablation.json").write_text(json.dumps(result, indent=2) + "\n")
    say(json.dumps(result, indent=2) if as_json else json.dumps(known) + "\n\n" + table(rows))
    return 0


def make_row(name: str, runs: Sequence[Run], base: Sequence[Run]) -> AblationRow:
    """Pools the runs of one variant; ``base`` are the unchanged drafter's on the same prompts."""
    kept = [k for run in runs for k in run.kept[:-1]]
    cycles = sum(len(run.kept) for run in runs)
    accept, accept_interval = acceptance_ratio(base, runs)
    speed, speed_interval = speed_ratio(base, runs)
    return AblationRow(
        variant=name,
        acceptance_length=sum(kept) / max(1, len(kept)),
        acceptance_ratio=accept,
        acceptance_ratio_interval=accept_interval,
        tokens_per_s=sum(len(run.tokens) for run in runs) / sum(run.seconds for run in runs),
        speed_ratio=speed,
        speed_ratio_interval=speed_interval,
        drafting_ms_per_cycle=1e3 * sum(run.draft_s for run in runs) / cycles,
        verify_ms_per_cycle=1e3 * sum(run.verify_s for run in runs) / cycles,
    )


def table(rows: Sequence[AblationRow]) -> str:
    """The rows as text."""
    lines = [
        f"{'variant':<38}{'accept':>7}  {'x unchanged':<19}{'tok/s':>7}  {'x unchanged':<19}{'draft ms':>9}"
        f"{'verify ms':>10}"
    ]
    for row in rows:
        accept = _ratio(row.acceptance_ratio, row.acceptance_ratio_interval)
        speed = _ratio(row.speed_ratio, row.speed_ratio_interval)
        lines.append(
            f"{row.variant:<38}{row.acceptance_length:>7.2f}  {accept:<19}{row.tokens_per_s:>7.1f}  {speed:<19}"
            f"{row.drafting_ms_per_cycle:>9.2f}{row.verify_ms_per_cycle:>10.2f}"
        )
    return "\n".join(lines)


def _ratio(value: float, interval: Interval) -> str:
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"

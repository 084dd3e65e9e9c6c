"""``specblockd bench speed``: transformers, plain decoding and every drafter side by side, interleaved.

One request at a time; every way answers every prompt, in an order drawn anew each time, so that a drift of the
machine hits all.
Ratios are paired over prompts with bootstrap intervals. Ratio rows use fixed trees; cost-chosen trees are rows of
their own, for SpecBlock and EAGLE-3 alike (design section 10).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from specblock.daemon import bench_rivals as rivals
from specblock.daemon.bench_rows import COST_CHOSEN, PLAIN, TRANSFORMERS, Row, WayName, make_row
from specblock.daemon.bench_ways import Question, Run, Way
from specblock.daemon.collect import Prompt, read_prompts
from specblock.daemon.errors import ConfigError
from specblock.daemon.facts import facts
from specblock.daemon.models import load_target, serving_dtype
from specblock.drafter.precision import number_format

DOMAINS = ("python", "cpp", "javascript", "manual")
ALL = "all"
SEED = 1000
LEARNING_PROMPTS = 16
"""Per kind of text, answered uncounted before the first counted one where tree sizes are chosen by what was learned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedSettings:
    """One comparison.

    Attributes:
        target: directory or hub id.
        prompts: directory with DOMAIN.jsonl files.
        per_domain: held-out prompts per kind of text, taken from the end of each file.
        temperatures: one table each; 1.0 is the headline.
        top_p, new_tokens: of every answer.
        dtype: "auto" or a number format.
        threads: of PyTorch, for all ways alike.
        drafters: of whose ways to answer, beside plain decoding and transformers; none are all.
        out: directory for the JSON and the page; None writes neither.
    """

    target: str = "models/demo-target"
    prompts: Path = Path("models/demo-prompts")
    per_domain: int = 40
    temperatures: tuple[float, ...] = (1.0, 0.8, 0.0)
    top_p: float = 0.95
    new_tokens: int = 64
    dtype: str = "auto"
    threads: int = 1
    drafters: tuple[str, ...] = ()
    out: Path | None = None


SMALL = SpeedSettings(per_domain=3, new_tokens=48, temperatures=(1.0,))
"""Ends within 20 minutes on two slow cores with all three kinds of drafter."""


def run(settings: SpeedSettings, as_json: bool, say: Callable[[str], None]) -> int:
    """Measures and prints; returns the exit code."""
    torch.set_num_threads(settings.threads)
    dtype = serving_dtype(settings.dtype, "cpu")
    target = load_target(settings.target, number_format(dtype, "cpu"), "cpu")
    found = rivals.networks(target)
    rivals.warm(target)
    untouched = rivals.untouched_target(target)
    rows: list[Row] = []
    for temperature in settings.temperatures:
        how = Question(temperature=temperature, top_p=settings.top_p, new_tokens=settings.new_tokens)
        # Anew: what a planner learned at one temperature is no use at another.
        ways = asked_for(dict(rivals.ways(target, untouched, found)), settings.drafters)
        by_domain = {}
        for domain in DOMAINS:
            prompts = read_prompts(settings.prompts / f"{domain}.jsonl")
            count = min(settings.per_domain, len(prompts) - 1)
            others = prompts[:-count]
            by_domain[domain] = interleaved(ways, prompts[-count:], how, others[0], others[:LEARNING_PROMPTS])
            say(f"temperature {temperature}: {domain} done")
        pooled = {name: [r for runs in by_domain.values() for r in runs[name]] for name in ways}
        for domain, runs in {**by_domain, ALL: pooled}.items():
            rows.extend(_rows(domain, temperature, runs, found))
    known: dict[str, Any] = facts(
        dtype=dtype,
        transformers_dtype=str(untouched.dtype).removeprefix("torch."),
        new_tokens=settings.new_tokens,
        top_p=settings.top_p,
        prompts=settings.per_domain,
        seed=SEED,
    )
    result = {"facts": known, "drafters": rivals.describe(found), "rows": [asdict(row) for row in rows]}
    if settings.out is not None:
        from specblock.daemon.bench_report import write_speed_report

        settings.out.mkdir(parents=True, exist_ok=True)
        (settings.out / "speed.json").write_text(json.dumps(result, indent=2) + "\n")
        say(f"page: {write_speed_report(settings.out / 'speed.html', result)}")
    say(json.dumps(result, indent=2) if as_json else table(known, rows))
    return 0


def all_prompts(directory: Path, seed: int) -> list[Prompt]:
    """The prompts of every kind of text in ``directory``, shuffled."""
    prompts = [p for domain in DOMAINS for p in read_prompts(directory / f"{domain}.jsonl")]
    Random(seed).shuffle(prompts)
    return prompts


def asked_for(ways: dict[WayName, Way], drafters: Sequence[str]) -> dict[WayName, Way]:
    """The ways of some drafters, and those that all ratios are to; without names all of them.

    Raises:
        ConfigError: there is no such drafter.
    """
    known = {name.drafter for name in ways}
    if unknown := set(drafters) - known:
        raise ConfigError(f"no drafter {', '.join(sorted(unknown))} here; there are {', '.join(sorted(known))}")
    kept = {PLAIN.drafter, TRANSFORMERS.drafter, *(drafters or known)}
    return {name: way for name, way in ways.items() if name.drafter in kept}


def interleaved(
    ways: dict[WayName, Way], prompts: Sequence[Prompt], how: Question, warm_up: Prompt, learning: Sequence[Prompt] = ()
) -> dict[WayName, list[Run]]:
    """Every way's run of every prompt, in an order drawn anew for every prompt, after one uncounted ``warm_up``.

    ``learning``: prompts that cost-chosen ways answer instead, uncounted too. A daemon runs for months; what its
    planner does in its first minute, when it tries much, is not how fast it is.
    """
    results: dict[WayName, list[Run]] = {name: [] for name in ways}
    order, rng = list(ways), Random(SEED)
    for name, way in ways.items():
        for number, prompt in enumerate(learning if name.tree == COST_CHOSEN and learning else [warm_up], start=1):
            way(prompt, how, number)
    for index, prompt in enumerate(prompts):
        rng.shuffle(order)
        for name in order:
            results[name].append(ways[name](prompt, how, SEED + index))
    return results


def _rows(domain: str, temperature: float, runs: dict[WayName, list[Run]], found: dict[str, Any]) -> list[Row]:
    made = []
    for name, own in runs.items():
        shared = True if name.shared_noise is None else name.shared_noise
        eagle = runs.get(WayName("eagle3_tuned", shared, "fixed"))
        made.append(
            make_row(
                name,
                domain,
                temperature,
                own,
                runs[PLAIN],
                runs[TRANSFORMERS],
                eagle,
                rivals.weight_bytes(name, found),
            )
        )
    return made


def table(known: object, rows: Sequence[Row]) -> str:
    """The rows as text."""
    head = (
        f"{'domain':<11}{'T':>4} {'drafter':<27}{'noise':<7}{'tree':<12}{'accept':>7}{'rep4':>6}{'fwd':>5}{'MB':>6}"
        f"{'draft ms':>9}{'verify ms':>10}{'tok/s':>8}  {'x plain':<19}{'x transformers':<19}{'x eagle3_tuned':<19}"
    )
    lines = [json.dumps(known), "", head]
    for r in rows:
        noise = "-" if r.shared_noise is None else ("shared" if r.shared_noise else "off")
        accept = "-" if r.acceptance_length is None else f"{r.acceptance_length:.2f}"
        eagle = "-"
        if r.ratio_to_eagle3_tuned is not None and r.ratio_to_eagle3_tuned_interval is not None:
            eagle = _ratio(r.ratio_to_eagle3_tuned, r.ratio_to_eagle3_tuned_interval)
        lines.append(
            f"{r.domain:<11}{r.temperature:>4} {r.drafter:<27}{noise:<7}{r.tree or '-':<12}{accept:>7}"
            f"{r.repeated_4grams:>6.2f}{r.forwards_per_cycle:>5.1f}{r.weight_bytes_per_cycle / 1e6:>6.1f}"
            f"{r.drafting_ms_per_cycle:>9.2f}{r.verify_ms_per_cycle:>10.2f}{r.tokens_per_s:>8.1f}  "
            f"{_ratio(r.ratio_to_plain, r.ratio_to_plain_interval):<19}"
            f"{_ratio(r.ratio_to_transformers, r.ratio_to_transformers_interval):<19}{eagle:<19}"
        )
    return "\n".join(lines)


def _ratio(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"

"""``specblockd bench speed``: transformers, plain decoding and SpecBlock side by side, interleaved prompt by prompt.

One request at a time; every way answers every prompt, in rotating order, so that a drift of the machine hits all.
Ratios are paired over prompts with bootstrap intervals.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from specblock.cuda_ext.sampling import SamplingParams
from specblock.daemon.collect import Prompt, read_prompts
from specblock.daemon.config_loader import load_config
from specblock.daemon.facts import facts
from specblock.daemon.models import draft_settings, load_pair
from specblock.daemon.oneshot import complete
from specblock.drafter.draft import BlockDrafter
from specblock.verifier.model import TargetModel

CONFIG, PROMPTS = Path("configs/local.yaml"), Path("models/demo-prompts")
NEW_TOKENS, TEMPERATURE, TOP_P = 64, 1.0, 0.95
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt answered one way. ``tokens`` are the generated ones."""

    tokens: tuple[int, ...]
    seconds: float
    cycles: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. Acceptance length is pooled over cycles, bonus included; intervals are 95 %."""

    drafter: str
    shared_noise: bool | None
    tree: str | None
    domain: str
    temperature: float
    acceptance_length: float
    repeated_4grams: float
    drafting_ms_per_cycle: float
    verify_ms_per_cycle: float
    tokens_per_s: float
    ratio_to_plain: float
    ratio_to_plain_interval: tuple[float, float]
    ratio_to_transformers: float
    ratio_to_transformers_interval: tuple[float, float]


Way = Callable[[Prompt, int], Run]
Name = tuple[str, bool | None]
"""(way, shared noise on or off where it applies)."""


def run(small: bool, as_json: bool) -> int:
    """Measures and prints; returns the exit code."""
    torch.set_num_threads(1)
    config = load_config(CONFIG)
    settings = draft_settings(config)
    target, drafter = load_pair(config.target.model, Path(config.drafter.path), "bfloat16", "cpu", settings)
    assert drafter is not None
    ways: dict[Name, Way] = {
        ("transformers_generate", None): _transformers(target),
        ("plain", None): _engine(target, None),
        ("specblock", True): _engine(target, drafter),
        ("specblock", False): _engine(
            target, BlockDrafter(drafter.model, replace(drafter.settings, shared_noise=False))
        ),
    }
    domains = ["python", "cpp"] if small else ["python", "cpp", "javascript", "manual"]
    count = 8 if small else 40
    rows: list[Row] = []
    for domain in domains:
        prompts = read_prompts(PROMPTS / f"{domain}.jsonl")[-count:]
        rows.extend(_rows(domain, _interleaved(ways, prompts)))
    measured = facts(new_tokens=NEW_TOKENS, temperature=TEMPERATURE, top_p=TOP_P, seed=0)
    known = {**measured, "tree": asdict(settings)}
    result = {"facts": known, "rows": [asdict(row) for row in rows]}
    print(json.dumps(result, indent=2) if as_json else _table(known, rows))
    return 0


def _engine(target: TargetModel, drafter: BlockDrafter | None) -> Way:
    def answer(prompt: Prompt, seed: int) -> Run:
        sampling = SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, seed=seed)
        done = complete(target, drafter, prompt.text, sampling, NEW_TOKENS, ignore_eos=True, collect=True)
        return Run(done.tokens, done.seconds, done.stats.cycles, done.stats.draft_s, done.stats.verify_s)

    return answer


def _transformers(target: TargetModel) -> Way:
    def answer(prompt: Prompt, seed: int) -> Run:
        tokens = torch.tensor([target.tokenizer.encode(prompt.text, add_special_tokens=False)])
        torch.manual_seed(seed)
        begin = time.perf_counter()
        with torch.inference_mode():
            output = target.transformers_model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=True,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                top_k=0,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                pad_token_id=1,
            )
        seconds = time.perf_counter() - begin
        return Run(tuple(output[0, tokens.shape[1] :].tolist()), seconds, NEW_TOKENS)

    return answer


def _interleaved(ways: dict[Name, Way], prompts: Sequence[Prompt]) -> dict[Name, list[Run]]:
    results: dict[Name, list[Run]] = {name: [] for name in ways}
    order = list(ways)
    for way in ways.values():  # warm-up, not counted
        way(prompts[0], 1)
    for index, prompt in enumerate(prompts):
        for name in order[index % len(order) :] + order[: index % len(order)]:
            results[name].append(ways[name](prompt, 1000 + index))
    return results


def _rows(domain: str, results: dict[Name, list[Run]]) -> list[Row]:
    plain, rival = results["plain", None], results["transformers_generate", None]
    rows = []
    for (name, shared_noise), runs in results.items():
        cycles = sum(r.cycles for r in runs)
        tokens = sum(len(r.tokens) for r in runs)
        to_plain, to_rival = _paired(plain, runs), _paired(rival, runs)
        rows.append(
            Row(
                drafter=name,
                shared_noise=shared_noise,
                tree=None if shared_noise is None else "fixed",
                domain=domain,
                temperature=TEMPERATURE,
                acceptance_length=tokens / cycles,
                repeated_4grams=float(np.mean([repeated_4grams(r.tokens) for r in runs])),
                drafting_ms_per_cycle=1e3 * sum(r.draft_s for r in runs) / cycles,
                verify_ms_per_cycle=1e3 * sum(r.verify_s for r in runs) / cycles,
                tokens_per_s=tokens / sum(r.seconds for r in runs),
                ratio_to_plain=to_plain[0],
                ratio_to_plain_interval=(to_plain[1], to_plain[2]),
                ratio_to_transformers=to_rival[0],
                ratio_to_transformers_interval=(to_rival[1], to_rival[2]),
            )
        )
    return rows


def _paired(base: Sequence[Run], runs: Sequence[Run]) -> tuple[float, float, float]:
    """Ratio of tokens/s over ``base`` with a 95 % bootstrap interval over prompts."""
    per_token = [np.array([r.seconds / len(r.tokens) for r in side]) for side in (base, runs)]
    rng = np.random.default_rng(0)
    index = rng.integers(0, len(runs), size=(_RESAMPLES, len(runs)))
    draws = per_token[0][index].sum(axis=1) / per_token[1][index].sum(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(per_token[0].sum() / per_token[1].sum()), float(low), float(high)


def repeated_4grams(tokens: Sequence[int]) -> float:
    """Share of 4-grams that occurred before in the same text."""
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _table(known: object, rows: Sequence[Row]) -> str:
    lines = [json.dumps(known), ""]
    lines.append(f"{'domain':<12}{'drafter':<24}{'noise':<8}{'accept':>7}{'rep4':>6}{'draft ms':>9}{'verify ms':>10}"
                 f"{'tok/s':>8}  {'x plain':<20}{'x transformers':<20}")  # fmt: skip
    for r in rows:
        noise = "-" if r.shared_noise is None else ("shared" if r.shared_noise else "off")
        plain = "{:.2f} [{:.2f}, {:.2f}]".format(r.ratio_to_plain, *r.ratio_to_plain_interval)
        rival = "{:.2f} [{:.2f}, {:.2f}]".format(r.ratio_to_transformers, *r.ratio_to_transformers_interval)
        lines.append(
            f"{r.domain:<12}{r.drafter:<24}{noise:<8}{r.acceptance_length:>7.2f}{r.repeated_4grams:>6.2f}"
            f"{r.drafting_ms_per_cycle:>9.2f}{r.verify_ms_per_cycle:>10.2f}{r.tokens_per_s:>8.1f}  "
            f"{plain:<20}{rival:<20}"
        )
    return "\n".join(lines)

"""What the demo measured: gain on the same questions, net speed, and both in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from specblock.bandit.ledger import LedgerRecord
from specblock.daemon.demo_traffic import NEW_TOKENS, TEMPERATURE, TOP_P, Answer
from specblock.daemon.facts import facts
from specblock.daemon.resampling import interval_95, resampled

DOMAINS = ("python", "cpp", "javascript")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One daemon's answers in the order they came, and its ledger."""

    name: str
    answers: tuple[Answer, ...]
    records: tuple[LedgerRecord, ...]
    parity: dict[str, float] | None


def paired_gain(static: Run, adaptive: Run, domain: str, fresh: bool = True) -> dict[str, float]:
    """Relative gain of live acceptance length, adaptive over static, on the same questions; 95 % bootstrap interval.

    Counts the questions that an updated drafter answered.
    """
    base = {a.question.number: a for a in static.answers}
    pairs = [
        (base[a.question.number], a)
        for a in adaptive.answers
        if a.question.domain == domain and a.question.fresh == fresh and not a.version.endswith("-base")
    ]
    if len(pairs) < 2:
        return {"requests": len(pairs)}
    cycles = np.array([(s.cycles, a.cycles) for s, a in pairs], dtype=float)
    tokens = np.array([(s.tokens, a.tokens) for s, a in pairs], dtype=float)

    def gain(index: Any) -> Any:
        lengths = tokens[index].sum(axis=-2) / cycles[index].sum(axis=-2)
        return lengths[..., 1] / lengths[..., 0] - 1

    low, high = interval_95(gain(resampled(len(pairs), 4000)))
    every = np.arange(len(pairs))
    return {
        "requests": len(pairs),
        "static_acceptance": float(tokens[:, 0].sum() / cycles[:, 0].sum()),
        "adaptive_acceptance": float(tokens[:, 1].sum() / cycles[:, 1].sum()),
        "gain": float(gain(every)),
        "lower": low,
        "upper": high,
    }


def summary(static: Run, adaptive: Run, engine_threads: int, device: str, dtype: str) -> dict[str, Any]:
    """The demo's figures; what they depend on is the daemons' engines, not this process."""

    def net(one: Run) -> dict[str, float]:
        tokens, last = sum(a.tokens for a in one.answers), one.answers[-1]
        serving, charged = max(a.serving_s for a in one.answers), max(a.charged_s for a in one.answers)
        return {
            "tokens": tokens,
            "serving_s": serving,
            "charged_s": charged,
            "net_tokens_per_s": tokens / (serving + charged),
            "wall_s": last.at_s,
        }

    return {
        "facts": facts(
            device, dtype=dtype, threads=engine_threads, new_tokens=NEW_TOKENS, temperature=TEMPERATURE, top_p=TOP_P
        ),
        "requests": len(static.answers),
        "promoted": [r.candidate_version for r in adaptive.records if r.stage == "promoted"],
        "fresh_prompts": {d: paired_gain(static, adaptive, d) for d in DOMAINS},
        "parity": adaptive.parity,
        "static": net(static),
        "adaptive": net(adaptive),
    }


def in_words(found: dict[str, Any]) -> Iterator[str]:
    """Lines for the terminal."""
    yield f"\n{len(found['promoted'])} updates promoted: {', '.join(found['promoted']) or 'none'}"
    for domain, row in found["fresh_prompts"].items():
        if "gain" in row:
            yield (
                f"{domain}: acceptance {row['static_acceptance']:.2f} static, {row['adaptive_acceptance']:.2f} "
                f"adaptive on {row['requests']} fresh prompts: {row['gain']:+.1%} "
                f"[{row['lower']:+.1%}, {row['upper']:+.1%}]"
            )
    if found["parity"]:
        parity = found["parity"]
        yield (
            f"replay equals live: {parity['replay_acceptance']:.3f} against {parity['live_acceptance']:.3f} "
            f"({parity['difference']:+.2%}, {parity['conversations']} conversations)"
        )
    for name in ("static", "adaptive"):
        row = found[name]
        yield (
            f"{name:<9}{row['net_tokens_per_s']:6.1f} net tokens/s: {row['tokens']} tokens, {row['serving_s']:.0f} "
            f"device-seconds serving, {row['charged_s']:.0f} charged to adaptation"
        )

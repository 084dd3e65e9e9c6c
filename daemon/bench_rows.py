"""What ``bench speed`` reports per way and kind of text, and how: pooled figures, paired ratios with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specblock.daemon.bench_ways import Run
from specblock.daemon.resampling import Interval, interval_95, resampled

_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class WayName:
    """A row's identity: drafter, shared noise (None where there is none), tree "fixed" or "cost_chosen" (or None)."""

    drafter: str
    shared_noise: bool | None = None
    tree: str | None = None


COST_CHOSEN = "cost_chosen"
PLAIN = WayName("plain")
TRANSFORMERS = WayName("transformers_generate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table; intervals are 95 %, bootstrapped over prompts.

    Attributes:
        acceptance_length: committed tokens over cycles, pooled, bonus included, without each answer's last cycle,
            which the token limit may have cut; None where cycles are not seen.
        acceptance_length_before_repeat: the same over the cycles before a text's first repeated 8-gram.
        repeated_4grams: share of 4-grams that occurred before in the same text; above 0.2 a row supports no claim.
        weight_bytes_per_cycle: drafter weights read, see ``drafter.weight_bytes``.
    """

    drafter: str
    shared_noise: bool | None
    tree: str | None
    domain: str
    temperature: float
    acceptance_length: float | None
    acceptance_length_before_repeat: float | None
    repeated_4grams: float
    forwards_per_cycle: float
    weight_bytes_per_cycle: float
    drafting_ms_per_cycle: float
    verify_ms_per_cycle: float
    tokens_per_s: float
    ratio_to_plain: float
    ratio_to_plain_interval: Interval
    ratio_to_transformers: float
    ratio_to_transformers_interval: Interval
    ratio_to_eagle3_tuned: float | None
    ratio_to_eagle3_tuned_interval: Interval | None
    acceptance_to_eagle3_tuned: float | None
    acceptance_to_eagle3_tuned_interval: Interval | None


def make_row(
    name: WayName,
    domain: str,
    temperature: float,
    runs: Sequence[Run],
    plain: Sequence[Run],
    transformers: Sequence[Run],
    eagle: Sequence[Run] | None,
    weight_bytes: tuple[int, int],
) -> Row:
    """Pools the runs of one way.

    Args:
        name: the way.
        domain: kind of text, or "all".
        temperature: of the question.
        runs: its runs, one per prompt.
        plain: plain decoding's runs on the same prompts.
        transformers: transformers' generate's.
        eagle: the better EAGLE-3's, if it ran.
        weight_bytes: bytes that one block and every further one read.
    """
    cycles, tokens = sum(len(r.kept) for r in runs), sum(len(r.tokens) for r in runs)
    forwards, drafted = sum(r.forwards for r in runs), sum(r.drafting_cycles for r in runs)
    seen = not name.drafter.startswith("transformers")
    first, later = weight_bytes
    to_plain, to_rival = speed_ratio(plain, runs), speed_ratio(transformers, runs)
    to_eagle = speed_ratio(eagle, runs) if eagle else None
    accept_to_eagle = acceptance_ratio(eagle, runs) if eagle and seen else None
    whole = [r.kept[:-1] for r in runs]
    early = [kept[: cycles_before_repeat(r)] for kept, r in zip(whole, runs, strict=True)]
    return Row(
        drafter=name.drafter,
        shared_noise=name.shared_noise,
        tree=name.tree,
        domain=domain,
        temperature=temperature,
        acceptance_length=_pooled(whole) if seen else None,
        acceptance_length_before_repeat=_pooled(early) if seen else None,
        repeated_4grams=float(np.mean([repeated_grams(r.tokens, 4) for r in runs])),
        forwards_per_cycle=forwards / cycles,
        weight_bytes_per_cycle=(first * drafted + later * (forwards - drafted)) / cycles,
        drafting_ms_per_cycle=1e3 * sum(r.draft_s for r in runs) / cycles,
        verify_ms_per_cycle=1e3 * sum(r.verify_s for r in runs) / cycles,
        tokens_per_s=tokens / sum(r.seconds for r in runs),
        ratio_to_plain=to_plain[0],
        ratio_to_plain_interval=to_plain[1],
        ratio_to_transformers=to_rival[0],
        ratio_to_transformers_interval=to_rival[1],
        ratio_to_eagle3_tuned=to_eagle[0] if to_eagle else None,
        ratio_to_eagle3_tuned_interval=to_eagle[1] if to_eagle else None,
        acceptance_to_eagle3_tuned=accept_to_eagle[0] if accept_to_eagle else None,
        acceptance_to_eagle3_tuned_interval=accept_to_eagle[1] if accept_to_eagle else None,
    )


def speed_ratio(base: Sequence[Run], runs: Sequence[Run]) -> tuple[float, Interval]:
    """Tokens per second over those of ``base``, paired over prompts."""
    return _paired([r.seconds / len(r.tokens) for r in base], [r.seconds / len(r.tokens) for r in runs])


def acceptance_ratio(base: Sequence[Run], runs: Sequence[Run]) -> tuple[float, Interval]:
    """Acceptance length over that of ``base``, paired over prompts (cycles per token, inverted)."""
    sides = [[len(r.kept[:-1]) / max(1, sum(r.kept[:-1])) for r in side] for side in (base, runs)]
    return _paired(*sides)


def _pooled(kept: Sequence[Sequence[int]]) -> float:
    return sum(map(sum, kept)) / max(1, sum(map(len, kept)))


def _paired(base: Sequence[float], own: Sequence[float]) -> tuple[float, Interval]:
    sides = [np.asarray(side, dtype=np.float64) for side in (base, own)]
    index = resampled(len(own), _RESAMPLES)
    draws = sides[0][index].sum(axis=1) / sides[1][index].sum(axis=1)
    return float(sides[0].sum() / sides[1].sum()), interval_95(draws)


def repeated_grams(tokens: Sequence[int], size: int) -> float:
    """Share of n-grams that occurred before in the same text."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def cycles_before_repeat(run: Run, size: int = 8) -> int:
    """Cycles that ended before the text's first repeated 8-gram did."""
    seen: set[tuple[int, ...]] = set()
    end = len(run.tokens)
    for i in range(len(run.tokens) - size + 1):
        gram = tuple(run.tokens[i : i + size])
        if gram in seen:
            end = i + size - 1
            break
        seen.add(gram)
    total = 0
    for index, kept in enumerate(run.kept):
        total += kept
        if total > end:
            return index
    return len(run.kept)

"""Recorded text for ``bench shift``: conversations of every kind, and what the base drafter would have accepted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from random import Random

from specblock.bandit.config import PolicyConfig
from specblock.daemon.bench_breakeven_stage import Sizes, Stage
from specblock.daemon.collect import CollectSettings, collect, read_prompts
from specblock.daemon.config import DaemonConfig
from specblock.daemon.errors import DependencyError
from specblock.drafter.replay import acceptance_length, replay
from specblock.drafter.window import Window

_SEEDS_APART = 1000
_FEWEST_TOKENS = 16  # shorter conversations have too few complete cycles to tell anything
Accepted = tuple[int, ...]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Pools:
    """Recorded conversations by domain.

    Attributes:
        heldout: served and judged on.
        train: what may be trained on.
        base: drafts that the base version accepts in each cycle of the held-out ones.
    """

    heldout: Mapping[str, Sequence[Window]]
    train: Mapping[str, Sequence[Window]]
    base: Mapping[str, Sequence[Accepted]]


def record(config: DaemonConfig, rules: PolicyConfig, sizes: Sizes, state: Path, say: Say) -> tuple[Pools, float]:
    """Text of the target for every kind, and the seconds of one request's cycle with every slot busy.

    Args:
        config: settled (see ``models.settle_dtype``).
        rules: not asked; part of what makes a stage.
        sizes: how much text.
        state: directory for a registry.
        say: receives a line per kind of text.

    Raises:
        DependencyError: a kind has fewer than two answers that are long enough.
    """
    bench = Stage(config, rules, sizes, state)
    try:
        cycle_s = bench.cycle_s()
        say(f"one request's cycle with {config.engine.slots} at a time: {1e3 * cycle_s:.2f} ms")
        held, train, base = {}, {}, {}
        for domain in sizes.domains:
            begin = time.perf_counter()
            train[domain] = _texts(bench, domain, "train", sizes.conversations)
            held[domain] = _texts(bench, domain, "heldout", sizes.heldout)
            walked = replay(bench.drafter, held[domain])
            base[domain] = [one.accepted for one in walked]
            say(
                f"{domain}: {len(train[domain])} conversations to train on, {len(held[domain])} to serve and judge on, "
                f"acceptance {acceptance_length(walked):.2f} ({time.perf_counter() - begin:.0f} s)"
            )
        return Pools(held, train, base), cycle_s
    finally:
        bench.host.close()


def requests_per_s(pools: Pools, cycle_s: float, busy: float) -> float:
    """Arrivals that keep the device so busy with the base drafter, averaged over the kinds of text."""
    spent = [cycle_s * sum(map(len, own)) / len(own) for own in pools.base.values()]
    return busy * len(spent) / sum(spent)


def request_s(accepted: Accepted, num_generated: int, cycle_s: float) -> float:
    """Device-seconds of a conversation; the cycle that its end cut is taken to be as good as the others."""
    return cycle_s * len(accepted) * num_generated / (sum(accepted) + len(accepted))


def _texts(bench: Stage, domain: str, side: str, count: int) -> list[Window]:
    """Distinct conversations on the prompts of one side, which come again, with other answers, when they run out.

    Raises:
        DependencyError: fewer than two are long enough.
    """
    sizes, heldout = bench.sizes, side == "heldout"
    prompts = read_prompts(sizes.prompts / f"{domain}.{side}.jsonl")
    Random(sizes.seed).shuffle(prompts)
    settings = CollectSettings(
        max_tokens=sizes.tokens,
        temperatures=(sizes.temperature,),
        top_p=sizes.top_p,
        seed=sizes.seed + heldout,
        top_k=bench.config.windows.top_k,
        heldout=heldout,
    )
    sides = [(prompts, count)]
    if heldout:
        # What is served and what is judged by (the two halves) share no prompt.
        half = len(prompts) // 2
        sides = [(prompts[:half] or prompts, count // 2), (prompts[half:], count // 2)]
    found = []
    for place, (own, number) in enumerate(sides):
        # Conversations are called by their seed.
        seeded = replace(settings, seed=settings.seed + _SEEDS_APART * place)
        made = collect(bench.target, list(islice(cycle(own), number)), seeded, time.time)
        found.append([window for window, _ in made if window.num_generated >= _FEWEST_TOKENS])
    most = min(map(len, found))
    kept = [window for windows in found for window in windows[:most]]
    if len(kept) < 2:
        raise DependencyError(
            f"{domain}.{side}.jsonl: fewer than two answers have {_FEWEST_TOKENS} tokens; try other prompts"
        )
    return kept

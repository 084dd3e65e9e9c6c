"""Measures updates for ``bench breakeven``: every arm on every kind of text, one at a time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from specblock.bandit.config import PolicyConfig
from specblock.bandit.parity import ParityEvidence
from specblock.bandit.parity import judge as judge_parity
from specblock.daemon.actors import newest_within
from specblock.daemon.bench_breakeven_stage import Sizes, Stage
from specblock.daemon.breakeven import Update
from specblock.daemon.config import DaemonConfig
from specblock.daemon.messages import RequestStats
from specblock.drafter.replay import acceptance_length
from specblock.drafter.window import Window

_PARITY_WINDOWS = 32
Say = Callable[[str], None]
ByDomain = dict[str, list[Window]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The base version's held-out conversations, served live with all slots busy.

    Attributes:
        cycle_s: device-seconds of one cycle of one request, from the cost curve measured on this machine.
        live_cycle_s: the same as accounted while serving, other work on the machine included.
        parity: live against replayed acceptance.
        parity_s: device-seconds of that check.
    """

    version: str
    cycle_s: float
    live_cycle_s: float
    acceptance: dict[str, float]
    cycles: dict[str, int]
    tokens_per_request: dict[str, float]
    num_train: dict[str, int]
    num_heldout: dict[str, int]
    parity: ParityEvidence
    parity_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Everything measured."""

    served: Served
    updates: tuple[Update, ...]


def run(config: DaemonConfig, policy: PolicyConfig, sizes: Sizes, say: Say) -> Measured:
    """Measures every arm of the policy on every kind of text.

    Args:
        config: settled (see ``models.settle_dtype``).
        policy: the decision rule's numbers, whose arms are trained.
        sizes: how much.
        say: receives a line per step.
    """
    with tempfile.TemporaryDirectory(prefix="specblock-breakeven-") as state:
        bench = Stage(config, policy, sizes, Path(state))
        try:
            return _measured(bench, say)
        finally:
            bench.host.close()


def _measured(bench: Stage, say: Say) -> Measured:
    cycle_s = bench.cycle_s()
    say(f"one request's cycle with {bench.config.engine.slots} at a time: {1e3 * cycle_s:.2f} ms")
    train: ByDomain = {}
    held: ByDomain = {}
    stats: list[RequestStats] = []
    for domain in bench.sizes.domains:
        begin = time.perf_counter()
        train[domain] = bench.training(domain)
        live = bench.heldout(domain)
        held[domain] = [window for window, _ in live]
        stats += [one for _, one in live]
        say(
            f"{domain}: {len(train[domain])} conversations to train on, {len(live)} held out, acceptance "
            f"{acceptance_length(held[domain]):.2f} ({time.perf_counter() - begin:.0f} s)"
        )
    served = _served(bench, cycle_s, train, held, stats)
    say(f"replay against live: {served.parity.verdict}, {served.parity.difference:+.2%}")
    updates = []
    for domain in bench.sizes.domains:
        windows = newest_within(newest_last(train, domain), bench.config.trainer.max_positions)
        judged = judged_on(held, domain)
        for arm in (arm for arm in bench.policy.arms if arm.steps > 0):
            done = bench.update(domain, arm, windows, judged, cycle_s)
            updates.append(done)
            say(
                f"{domain} {arm.name}: trained {done.train_s:.1f} s, scored {done.score_s:.1f} s, acceptance "
                f"{done.accepted[0]:.2f} -> {done.accepted[1]:.2f}, saves {done.saving().relative:+.1%}"
            )
    return Measured(served=served, updates=tuple(updates))


def _served(bench: Stage, cycle_s: float, train: ByDomain, held: ByDomain, stats: Sequence[RequestStats]) -> Served:
    mixed = [window for group in zip(*held.values(), strict=False) for window in group]
    report = bench.trainer.parity(bench.base, mixed[-_PARITY_WINDOWS:])
    spent = sum(s.device_s for s in stats)
    return Served(
        version=bench.base,
        cycle_s=cycle_s,
        live_cycle_s=spent / max(1, sum(s.cycles for s in stats)),
        acceptance={domain: acceptance_length(own) for domain, own in held.items()},
        cycles={domain: sum(len(w.accepted) for w in own) for domain, own in held.items()},
        tokens_per_request={d: sum(w.num_generated for w in own) / len(own) for d, own in held.items()},
        num_train={domain: len(own) for domain, own in train.items()},
        num_heldout={domain: len(own) for domain, own in held.items()},
        parity=judge_parity(report.rows, bench.policy.parity),
        parity_s=report.device_s,
    )


def newest_last(windows: ByDomain, domain: str) -> list[Window]:
    """What the store holds in a phase of ``domain``: everything that was seen before, then that."""
    others = zip_longest(*(own for other, own in windows.items() if other != domain))
    return [w for group in others for w in group if w is not None] + windows[domain]


def judged_on(held: ByDomain, domain: str) -> list[Window]:
    """Every held-out conversation of the phase, and a quarter as many of each other kind, for what is forgotten."""
    others = [w for other, own in held.items() if other != domain for w in own[: max(1, len(own) // 4)]]
    return held[domain] + others

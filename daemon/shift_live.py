"""Live runs beside the replay of ``bench shift``: the engine really serves what the replay says about a version.

At the end of every phase some of the conversations that it served are served again, through an engine with as many
slots as the daemon's, by the version that serves then. Accepted drafts must be those of the replay; seconds are the
engine's own accounts, where the replay takes every cycle to last what the cost curve measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specblock.daemon.bench_breakeven_stage import Stage
from specblock.daemon.collect import served_again
from specblock.daemon.shift_recording import Accepted, request_s
from specblock.daemon.shift_traffic import ShiftTraffic
from specblock.drafter.window import Window


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePhase:
    """One phase, served live by the version that served at its end; device-seconds.

    Attributes:
        conversations: served, with so many ``tokens``.
        differ: of these, such whose accepted drafts were not those of the replay.
        live_s: the engine's account of drafting, verification and everything else in cycles.
        replayed_s: the same conversations by replay and cost curve.
    """

    phase: int
    domain: str
    version: str
    conversations: int
    tokens: int
    differ: int
    live_s: float
    replayed_s: float


def live_phase(
    bench: Stage,
    phase: int,
    version: str,
    windows: Sequence[Window],
    replayed: Sequence[Accepted],
    cycle_s: float,
) -> LivePhase:
    """Serves ``windows`` of one kind of text with what ``bench`` drafts with now.

    Args:
        bench: with the version swapped in.
        phase: number.
        version: its name.
        windows: recorded conversations.
        replayed: drafts accepted in each complete cycle of each.
        cycle_s: device-seconds of one cycle of one request.
    """
    slots = bench.config.engine.slots
    done = list(served_again(bench.target, windows, slots, time.perf_counter, bench.drafter, version))
    live = {window.conversation_id: window.accepted for window, _ in done}
    expected = {w.conversation_id: tuple(accepted) for w, accepted in zip(windows, replayed, strict=True)}
    return LivePhase(
        phase=phase,
        domain=windows[0].domain,
        version=version,
        conversations=len(done),
        tokens=sum(stats.completion_tokens for _, stats in done),
        differ=sum(live.get(name) != accepted for name, accepted in expected.items()),
        live_s=sum(stats.device_s for _, stats in done),
        replayed_s=sum(request_s(a, w.num_generated, cycle_s) for w, a in zip(windows, replayed, strict=True)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRow:
    """One policy: net tokens per device-second over doing nothing, live and by replay.

    Attributes:
        ratio, replayed_ratio: over the same version of every phase's end, all costs charged.
        s_per_token, replayed_s_per_token: of serving.
        differ: conversations whose accepted drafts were not those of the replay.
    """

    policy: str
    seed: int
    ratio: float
    replayed_ratio: float
    s_per_token: float
    replayed_s_per_token: float
    conversations: int
    differ: int


def live_rows(
    measured: dict[tuple[str, int], tuple[Sequence[LivePhase], float]], traffic: dict[int, ShiftTraffic], static: str
) -> list[LiveRow]:
    """Each policy's phases weighted with what they really had of tokens, beside those of ``static``.

    Args:
        measured: phases and charged device-seconds by policy and seed.
        traffic: of each seed.
        static: name of the policy that does nothing.
    """
    made = []
    for (policy, seed), (phases, charged_s) in measured.items():
        weights = np.bincount(traffic[seed].phase).astype(float)
        base, _ = measured[static, seed]
        live_s, replayed_s = _spent_s(phases, weights)
        static_live_s, static_replayed_s = _spent_s(base, weights)
        tokens = sum(float(weights[p.phase]) * p.tokens / p.conversations for p in phases)
        made.append(
            LiveRow(
                policy=policy,
                seed=seed,
                # Charges are real seconds in both.
                ratio=static_live_s / (live_s + charged_s),
                replayed_ratio=static_replayed_s / (replayed_s + charged_s),
                s_per_token=live_s / tokens,
                replayed_s_per_token=replayed_s / tokens,
                conversations=sum(p.conversations for p in phases),
                differ=sum(p.differ for p in phases),
            )
        )
    return made


def _spent_s(phases: Sequence[LivePhase], requests: NDArray[np.float64]) -> tuple[float, float]:
    """Device-seconds of all requests, live and by replay, if they were like those of each phase that were served."""
    scale = [float(requests[p.phase]) / p.conversations for p in phases]
    live_s = sum(s * p.live_s for s, p in zip(scale, phases, strict=True))
    return live_s, sum(s * p.replayed_s for s, p in zip(scale, phases, strict=True))


def live_lines(rows: Sequence[LiveRow]) -> Iterator[str]:
    """For people."""
    for row in rows:
        yield (
            f"live: {row.policy} (seed {row.seed}) {row.ratio:.3f} x static, by replay {row.replayed_ratio:.3f} "
            f"({row.ratio / row.replayed_ratio - 1:+.1%}); {1e3 * row.s_per_token:.2f} device-ms per token, by replay "
            f"and cost curve {1e3 * row.replayed_s_per_token:.2f}; {row.differ} of {row.conversations} conversations "
            "accepted other drafts"
        )

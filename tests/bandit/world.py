"""A small world for the bandit: drafters with a true acceptance per domain, conversations, training that helps.

A conversation is a row of uniform numbers, one per token. A drafter with hit rate p accepts the next draft token where
the number is below p, at most ``DEPTH`` in a row. So every drafter can be replayed exactly on every conversation, and
live cycles are the replay of the version that served, unless something is broken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from specblock.bandit.actions import (
    CompareReport,
    DomainWindows,
    Focus,
    Mix,
    PairedReplay,
    ParityReport,
    ParityRow,
    SwapReport,
    TrainReport,
    WindowSummary,
)
from specblock.bandit.config import (
    Arm,
    CostConfig,
    GateConfig,
    HorizonConfig,
    ParityConfig,
    PolicyConfig,
    ServiceConfig,
    StatisticsConfig,
)
from specblock.bandit.events import AcceptanceEvent, encode
from specblock.bandit.stream_types import Stream

DEPTH, TOKENS, CYCLE_S = 6, 64, 0.02
DEAR_S = 1e-3
"""Device-seconds per position at which training on costs more than the little that a trial may have overlooked."""


@dataclass(frozen=True, slots=True)
class Conversation:
    conversation_id: str
    domain: str
    time_s: float
    live_version: str
    live_cycles: int
    uniforms: tuple[float, ...]
    heldout: bool


def walk(uniforms: tuple[float, ...], rate: float) -> list[int]:
    """Accepted draft tokens of each cycle of a drafter with hit rate ``rate``."""
    accepted, start = [], 0
    while start < len(uniforms):
        run = 0
        while run < DEPTH and start + run + 1 < len(uniforms) and uniforms[start + run] < rate:
            run += 1
        accepted.append(run)
        start += run + 1
    return accepted


@dataclass
class World:
    """Implements ``Actions``. ``rates[version][domain]`` is the truth; ``ceiling`` is what training can reach."""

    stream: Stream
    rates: dict[str, dict[str, float]] = field(default_factory=lambda: {"v1": {"python": 0.85, "manual": 0.8}})
    ceiling: float = 0.85
    s_per_position: float = 1e-5
    recovers: dict[str, float] = field(default_factory=lambda: {"head": 0.6, "full": 0.9})
    broken: bool = False
    serving: str = "v1"
    seed: int = 0
    calls: list[str] = field(default_factory=list)
    outside: list[tuple[str, str]] = field(default_factory=list)
    """(decision id, action) of everything that must happen at most once."""
    conversations: list[Conversation] = field(default_factory=list)
    discarded: list[str] = field(default_factory=list)
    sequence: int = 0
    served: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def serve(self, domain: str, now_s: float, **changes: object) -> AcceptanceEvent:
        """One request: a conversation is kept and its event is appended."""
        uniforms = tuple(self.random.random(TOKENS).tolist())
        rate = self.rates[self.serving][domain] * (0.6 if self.broken else 1.0)
        cycles = walk(uniforms, rate)
        histogram = tuple(cycles.count(a) for a in range(DEPTH + 1))
        name = f"c{self.served}"
        self.conversations.append(
            Conversation(name, domain, now_s, self.serving, len(cycles), uniforms, self.served % 3 == 0)
        )
        self.served += 1
        values: dict[str, object] = {
            "incarnation": "engine-0",
            "sequence": self.sequence,
            "time_s": now_s,
            "request_id": name,
            "engine": "e0",
            "drafter_version": self.serving,
            "domain": domain,
            "cycles": len(cycles),
            "committed_tokens": TOKENS,
            "accepted_histogram": histogram,
            "draft_s": 0.25 * CYCLE_S * len(cycles),
            "verify_s": 0.75 * CYCLE_S * len(cycles),
            "other_s": 0.0,
            "draft_nodes": 8 * len(cycles),
        }
        event = AcceptanceEvent(**{**values, **changes})  # type: ignore[arg-type]
        self.sequence += 1
        self.stream.append(encode(event))
        return event

    def shift(self, domain: str, rate: float) -> None:
        """The traffic of ``domain`` changes: every version's hit rate there becomes ``rate``."""
        for rates in self.rates.values():
            rates[domain] = rate
        self.conversations = [c for c in self.conversations if c.domain != domain]

    def windows(self) -> WindowSummary:
        self.calls.append("windows")
        domains = sorted({c.domain for c in self.conversations})
        return WindowSummary(
            domains=tuple(
                DomainWindows(
                    domain=d,
                    num_train=sum(c.domain == d and not c.heldout for c in self.conversations),
                    num_heldout=sum(c.domain == d and c.heldout for c in self.conversations),
                    train_positions=TOKENS * sum(c.domain == d and not c.heldout for c in self.conversations),
                )
                for d in domains
            )
        )

    def parity(self, version: str, after_time_s: float | None = None) -> ParityReport:
        self.calls.append("parity")
        served = [c for c in self.conversations if c.live_version == version]
        mine = [c for c in served if after_time_s is None or c.time_s > after_time_s][-40:]
        rows = tuple(
            ParityRow(
                conversation_id=c.conversation_id,
                tokens=TOKENS,
                live_cycles=c.live_cycles,
                replay_cycles=len(walk(c.uniforms, self.rates[version][c.domain])),
            )
            for c in mine
        )
        return ParityReport(rows=rows, device_s=0.05)

    def train(
        self,
        decision_id: str,
        arm: Arm,
        base_version: str,
        fraction: float,
        resume: bool,
        focus: Mapping[str, Focus],
    ) -> TrainReport:
        self.calls.append(f"train {arm.name} {fraction:g}")
        self.outside.append((decision_id, f"train {fraction:g}"))
        part = fraction if not resume else 1.0
        seen = self.recovers[arm.name] * (1.0 if part == 1.0 else 0.5)
        candidate = f"{decision_id}-{arm.name}"
        self.rates[candidate] = {d: r + seen * (self.ceiling - r) for d, r in self.rates[base_version].items()}
        done = fraction if not resume else 0.9
        positions = round(done * arm.steps * arm.positions_per_step)
        seconds = positions * self.s_per_position
        newest = max(c.time_s for c in self.conversations)
        return TrainReport(
            candidate_version=candidate, positions=positions, train_s=seconds, device_s=seconds, cutoff_time_s=newest
        )

    def compare(
        self, old_version: str, new_version: str, after_time_s: float | None, mix: Mix | None = None
    ) -> CompareReport:
        self.calls.append("compare")
        kept = [c for c in self.conversations if c.heldout and (after_time_s is None or c.time_s > after_time_s)]
        kept = [kept[i] for i in mix.chosen([c.domain for c in kept])] if mix else kept
        rows = tuple(
            PairedReplay(
                conversation_id=c.conversation_id,
                domain=c.domain,
                time_s=c.time_s,
                tokens=TOKENS,
                cycles_old=len(walk(c.uniforms, self.rates[old_version][c.domain])),
                cycles_new=len(walk(c.uniforms, self.rates[new_version][c.domain])),
                live_version=c.live_version,
                live_cycles=c.live_cycles,
            )
            for c in kept[-80:]
        )
        return CompareReport(rows=rows, cycle_s_old=CYCLE_S, cycle_s_new=CYCLE_S, device_s=0.1)

    def promote(self, decision_id: str, candidate_version: str) -> SwapReport:
        self.calls.append("promote")
        self.outside.append((decision_id, "promote"))
        name = f"{candidate_version}-live"
        self.rates[name] = dict(self.rates[candidate_version])
        self.serving = name
        return SwapReport(ok=True, stall_s=0.01, detail="", version=name)

    def rollback(self, decision_id: str, to_version: str) -> SwapReport:
        self.calls.append("rollback")
        self.serving = to_version
        return SwapReport(ok=True, stall_s=0.01, detail="", version=to_version)

    def versions(self) -> tuple[str, ...]:
        served = [name for name in self.rates if name == "v1" or name.endswith("-live")]
        return (*served[:1], *reversed(served[1:]))

    def restore(self, decision_id: str, version: str) -> SwapReport:
        self.calls.append("restore")
        self.outside.append((decision_id, "restore"))
        self.serving = version
        return SwapReport(ok=True, stall_s=0.01, detail="", version=version)

    def discard(self, candidate_version: str) -> None:
        self.calls.append("discard")
        self.discarded.append(candidate_version)

    def serving_version(self) -> str:
        return self.serving


def small_policy(**changes: object) -> PolicyConfig:
    """A policy that decides on little traffic."""
    values: dict[str, object] = {
        "arms": (
            Arm(name="skip"),
            Arm(name="head", patterns=("*head*",), steps=20, learning_rate=1e-3, positions_per_step=1000),
        ),
        "min_train_windows": 8,
        "min_heldout_windows": 4,
        "cost": CostConfig(prior_score_s=0.1, prior_stall_s=0.01),
        "horizon": HorizonConfig(cap_s=1800.0),
        "parity": ParityConfig(min_rows=6, min_cycles=60, valid_s=30.0, retry_s=5.0, every_s=100.0),
        "gate": GateConfig(verify_requests=8, settle_requests=24, deadline_s=300.0, first_look_requests=12),
        "statistics": StatisticsConfig(
            reference_cycles=150, min_window_cycles=80, window_events=24, rate_half_life_s=30.0
        ),
        **changes,
    }
    return PolicyConfig(**values)  # type: ignore[arg-type]


def service_config(directory: object, **changes: object) -> ServiceConfig:
    """Every step snapshots; decisions every two seconds."""
    values: dict[str, object] = {
        "directory": str(directory),
        "decide_every_s": 2.0,
        "decide_every_events": 2,
        "snapshot_every_s": 0.0,
        **changes,
    }
    return ServiceConfig(**values)  # type: ignore[arg-type]

"""What the bandit asks of the outside world, and what comes back. The daemon implements ``Actions`` with Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from specblock.bandit.config import Arm


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainWindows:
    """Conversations of one domain that are kept for training and for held-out scoring."""

    domain: str
    num_train: int
    num_heldout: int
    train_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSummary:
    """What could be trained on right now."""

    domains: tuple[DomainWindows, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityRow:
    """One conversation, served live by a version and replayed with the same version."""

    conversation_id: str
    tokens: int
    live_cycles: int
    replay_cycles: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """Rows of a parity check and what it cost."""

    rows: tuple[ParityRow, ...]
    device_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """One training run.

    Attributes:
        positions: training positions processed, repeats included.
        train_s: wall seconds of training (interference is charged on these).
        device_s: training device-seconds.
        cutoff_time_s: arrival of the newest conversation used, seconds since the epoch.
    """

    candidate_version: str
    positions: int
    train_s: float
    device_s: float
    cutoff_time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedReplay:
    """One held-out conversation replayed with two versions.

    Attributes:
        time_s: arrival of the conversation, seconds since the epoch.
        live_version: the version that served it ("" if mixed).
        live_cycles: the cycles it took live.
    """

    conversation_id: str
    domain: str
    time_s: float
    tokens: int
    cycles_old: int
    cycles_new: int
    live_version: str
    live_cycles: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareReport:
    """Paired replays, the seconds one cycle takes with either version, and the device-seconds it all cost."""

    rows: tuple[PairedReplay, ...]
    cycle_s_old: float
    cycle_s_new: float
    device_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapReport:
    """A promotion or roll-back: ``version`` is what serves now, by the registry's name."""

    ok: bool
    stall_s: float
    detail: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Focus:
    """What an update is meant for in one kind of text.

    Attributes:
        weight: how much, against others; at least 0.
        part: share of its conversations, about, that need it: those that are hardest to draft for.
        rehearsed: how much, against others, of what is trained on lest it be forgotten; where no domain says so,
            conversations are taken for that as they came.
    """

    weight: float
    part: float = 1.0
    rehearsed: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Which conversations a candidate is judged on: those that it is made for, and beside them what its horizon brings.

    Attributes:
        meant: domains that it is made for.
        others: most conversations of other domains for each of these.
        owed: such that earlier looks were entitled to and did not take; below 0: that they took too many of.
    """

    meant: tuple[str, ...]
    others: float
    owed: float = 0.0

    def chosen(self, domains: Sequence[str]) -> list[int]:
        """Positions of the conversations to take, of such domains, oldest first; of the others the newest.

        It asks for nothing but domains, so that a test on what was chosen is as valid as one on all.
        """
        meant = {i for i, domain in enumerate(domains) if domain in self.meant}
        others = [i for i in range(len(domains)) if i not in meant]
        room = max(0, math.floor(self.owed + self.others * len(meant)))
        return sorted(meant | set(others[len(others) - min(room, len(others)) :]))

    def after(self, domains: Sequence[str]) -> Mix:
        """The mix of the next look, ``domains`` being those of all conversations that were taken so far."""
        taken = sum(domain in self.meant for domain in domains)
        return replace(self, owed=self.others * taken - (len(domains) - taken))


class Actions(Protocol):
    """The outside world. Every method may raise; the service then abandons and charges the update."""

    def windows(self) -> WindowSummary:
        """What could be trained on right now."""

    def parity(self, version: str, after_time_s: float | None = None) -> ParityReport:
        """Replays ``version`` on conversations that it served live, after that time if one is given."""

    def train(
        self,
        decision_id: str,
        arm: Arm,
        base_version: str,
        fraction: float,
        resume: bool,
        focus: Mapping[str, Focus],
    ) -> TrainReport:
        """Runs steps of ``arm`` from ``base_version`` until ``fraction`` of them are done.

        ``resume`` continues this decision's micro-profile instead of starting at the base; ``focus`` says what the
        update is meant for, by domain.
        """

    def compare(
        self, old_version: str, new_version: str, after_time_s: float | None, mix: Mix | None = None
    ) -> CompareReport:
        """Replays both versions on held-out conversations that arrived after ``after_time_s`` (None: all), in a mix."""

    def versions(self) -> tuple[str, ...]:
        """Stored versions that may serve again, the base first, then the newest; some may turn out damaged."""

    def restore(self, decision_id: str, version: str) -> SwapReport:
        """Makes a stored version serve again because it is expected to be better; asking twice is harmless."""

    def promote(self, decision_id: str, candidate_version: str) -> SwapReport:
        """Makes the candidate serve."""

    def rollback(self, decision_id: str, to_version: str) -> SwapReport:
        """Makes ``to_version`` serve again; asking twice is harmless."""

    def discard(self, candidate_version: str) -> None:
        """Forgets a candidate."""

    def serving_version(self) -> str:
        """What serves now, by the registry's name."""

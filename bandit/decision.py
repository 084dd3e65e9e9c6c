"""What the decision rule reads, answers and remembers."""

from __future__ import annotations

from dataclasses import dataclass, field

from specblock.bandit.cost import NetEstimate
from specblock.bandit.estimate import LinearEvidence, ScalarEvidence
from specblock.bandit.gain import MeasuredGain
from specblock.bandit.parity import ParityResult

NONE, DRIFT, FAULT, LOAD = "none", "drift", "fault", "load_or_sampling"
"""Verdicts on what happened to acceptance."""

SKIP, CHECK, PROBE, CONTINUE, ABANDON = "skip", "check_parity", "probe", "continue", "abandon"
"""Actions a decision may name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainContext:
    """One domain as the rule sees it.

    Attributes:
        share: posterior share of serving seconds.
        acceptance: pooled acceptance length of the recent window.
        reference: what the window's strata should give.
        drop: ``1 - acceptance / reference``; 0 when there is no reference.
        drop_se: its standard error.
        raw_drop: the same against the version's own first cycles, whatever their sampling and load.
        cycles: of the recent window.
        device_s_per_token: of the recent window.
        measurable: the window is long enough.
        num_train: training conversations.
        num_heldout: held-out conversations.
    """

    domain: str
    share: float
    acceptance: float
    reference: float
    drop: float
    drop_se: float
    raw_drop: float
    cycles: int
    device_s_per_token: float
    measurable: bool
    num_train: int
    num_heldout: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionContext:
    """Everything a decision reads besides the policy's own state.

    Attributes:
        serving_version: the registry's name.
        busy_fraction: share of serving time spent in speculative cycles.
        num_changes: changes of acceptance reported by the detectors so far.
        observed_s: length of the observation.
        measured: gain of a candidate after its micro-profile; None at rest.
        measured_arm: its arm.
        traffic_share: at the decision to probe; only with ``measured``.
        mean_drop: at the decision to probe; only with ``measured``.
    """

    now_s: float
    serving_version: str
    domains: tuple[DomainContext, ...]
    busy_fraction: float
    num_changes: int
    observed_s: float
    measured: MeasuredGain | None = None
    measured_arm: str = ""
    traffic_share: float = 0.0
    mean_drop: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do, why, and what every arm looked like.

    Attributes:
        action: skip, check_parity, probe, continue or abandon.
        arm: of the action; empty for skip and check_parity.
        verdict: none, drift, fault or load_or_sampling.
        reason: in words.
        estimates: one per training arm, or the one arm that was measured.
        traffic_share: share of serving seconds of the domains expected to gain.
        mean_drop: their share-weighted drop.
    """

    action: str
    arm: str = ""
    verdict: str
    reason: str
    estimates: tuple[NetEstimate, ...] = ()
    traffic_share: float = 0.0
    mean_drop: float = 0.0

    def estimate(self) -> NetEstimate | None:
        """The chosen arm's estimate."""
        return next((estimate for estimate in self.estimates if estimate.arm == self.arm), None)


@dataclass(frozen=True, slots=True)
class ArmEvidence:
    """What was learned of one arm: realised gains, and device-seconds per training position."""

    gain: LinearEvidence = field(default_factory=LinearEvidence)
    seconds: ScalarEvidence = field(default_factory=ScalarEvidence)


@dataclass(frozen=True, slots=True)
class Charge:
    """Device-seconds spent on adaptation at a time."""

    time_s: float
    device_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityRecord:
    """Newest parity check."""

    version: str
    time_s: float
    result: ParityResult


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyState:
    """What the rule has learned and remembers.

    Attributes:
        decisions: decisions taken; numbers the next one.
        charges: of the last hour.
        changes_attributed: detector reports that a parity check has looked into.
        ended_s: end of the newest update; 0 before any.
        cooldown_s: plain cool-down of its arm.
        abandoned_in_row: updates that ended without a realised gain since the last that had one.
        abandoned_drop: drop at the newest abandoned update.
    """

    arms: dict[str, ArmEvidence] = field(default_factory=dict)
    score: ScalarEvidence = field(default_factory=ScalarEvidence)
    stall: ScalarEvidence = field(default_factory=ScalarEvidence)
    parity: ParityRecord | None = None
    decisions: int = 0
    charges: tuple[Charge, ...] = ()
    changes_attributed: int = 0
    ended_s: float = 0.0
    cooldown_s: float = 0.0
    abandoned_in_row: int = 0
    abandoned_drop: float = 0.0

"""What the decision rule reads, answers and remembers."""

from __future__ import annotations

from dataclasses import dataclass, field

from specblock.bandit.config import Arm
from specblock.bandit.cost import MeanSums, NetValue, TrainingSums
from specblock.bandit.estimate import LinearEvidence, ShareEvidence
from specblock.bandit.gate import Saving
from specblock.bandit.parity import ParityEvidence
from specblock.bandit.presence import Presence

NONE, DRIFT, FAULT, LOAD = "none", "drift", "fault", "load_or_sampling"
"""Verdicts on what happened to acceptance."""

SKIP, CHECK, PROBE, CONTINUE, ABANDON = "skip", "check_parity", "probe", "continue", "abandon"
"""Actions a decision may name."""

HOUR_S = 3600.0
"""The budget's period."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PastLevel:
    """What an earlier version is known to save in a domain, against the one that serves.

    Attributes:
        drop: as replayed side by side, or else ``1 - acceptance now / acceptance then`` from what it last accepted in
            the same strata; negative where it is worse.
        drop_se: its standard error.
    """

    version: str
    drop: float
    drop_se: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What ``version`` saved against ``against`` when both were replayed on conversations of a domain."""

    version: str
    against: str
    domain: str
    saving: float
    se: float
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainContext:
    """One domain as the rule sees it.

    Attributes:
        share: posterior share of serving seconds.
        acceptance: pooled acceptance length of the recent window.
        reference: what the window's strata should give.
        drop: ``1 - acceptance / reference`` (over the strata that have a reference); 0 when none has.
        drop_se: its standard error.
        raw_drop: the same against the version's own first cycles, whatever their sampling and load.
        raw_drop_se: its standard error.
        cycles: of the recent window.
        device_s_per_token: of the recent window.
        measurable: the window is long and new enough.
        num_train: training conversations.
        num_heldout: held-out conversations.
        presence: how it came and went; None: nothing is known of it, and its present share is taken to last as long as
            traffic as a whole.
        past: earlier versions that could serve again and of which something is known here.
        part: share of its text, about, that the drop comes from; 1 where nothing tells.
        growing_s: seconds in which the drop has grown to what it is; 0 if it does not grow.
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
    presence: Presence | None = None
    past: tuple[PastLevel, ...] = ()
    part: float = 1.0
    growing_s: float = 0.0
    raw_drop_se: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A domain that an update is expected to help, as it was when the update was decided.

    Attributes:
        lasting_s: expected seconds of its traffic within the horizon, in seconds of all traffic; None: not known.
        staying_s: the same until it goes away for the first time.
        past: what is known of earlier versions there.
        there: it is part of the traffic of now.
        settled: it has been there for long enough that shares show how much of traffic it is, or never stays so long.
        part: share of its text, about, that the drop comes from.
        growing_s: seconds in which the drop has grown to what it is; 0 if it does not grow.
    """

    domain: str
    share: float
    drop: float
    drop_se: float
    lasting_s: float | None = None
    staying_s: float | None = None
    past: tuple[PastLevel, ...] = ()
    there: bool = True
    settled: bool = True
    part: float = 1.0
    growing_s: float = 0.0

    def level(self, version: str) -> PastLevel | None:
        """What is known of ``version`` there; None: nothing."""
        return next((level for level in self.past if level.version == version), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """The outcome of a trial: what it saves on held-out conversations, against the version that serves.

    ``version``: the earlier version that was compared instead, if the arm restores one.
    """

    arm: str
    version: str = ""
    targets: tuple[Target, ...]
    saving: Saving


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionContext:
    """Everything a decision reads besides the policy's own state.

    Attributes:
        serving_version: the registry's name.
        busy_devices: serving devices busy with speculative cycles, on average.
        num_changes: changes of acceptance reported by the detectors so far.
        observed_s: length of the observation.
        since_s: since the decision before; 0 if there was none.
        probed: None at rest.
        stored: earlier versions that could serve again.
        base: the one of them that the operator configured; "" if it serves or may not serve again.
    """

    now_s: float
    serving_version: str
    domains: tuple[DomainContext, ...]
    busy_devices: float
    num_changes: int
    observed_s: float
    since_s: float = 0.0
    probed: Probed | None = None
    stored: tuple[str, ...] = ()
    base: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """An arm's predicted net value, and why it may not be used now (empty if it may).

    Attributes:
        version: what it would restore, if the arm restores.
        curiosity: expected device-seconds that come of comparing that version where nothing is known of it, the
            comparison paid; 0 where something is.
    """

    value: NetValue
    blocked: str = ""
    version: str = ""
    curiosity: float = 0.0

    @property
    def named(self) -> str:
        """The arm, and the version that it restores."""
        return f"{self.value.arm} of {self.version}" if self.version else self.value.arm


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do, why, and what every arm looked like.

    Attributes:
        action: skip, check_parity, probe, continue or abandon.
        arm: of the action; empty for skip and check_parity.
        verdict: none, drift, fault or load_or_sampling.
        reason: in words.
        options: one per training arm, or the one arm that was measured.
        targets: domains that the arm is expected to help.
        probability: of this action in this context; below 1 only near the margin, where the rule explores.
    """

    action: str
    arm: str = ""
    verdict: str
    reason: str
    options: tuple[Option, ...] = ()
    targets: tuple[Target, ...] = ()
    probability: float = 1.0

    def option(self) -> Option | None:
        """The chosen arm's option."""
        return next((option for option in self.options if option.value.arm == self.arm), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmEvidence:
    """What was learned of one arm.

    Attributes:
        gain: gains of complete updates over the drop.
        training: training seconds over positions.
        shown: share of its complete gain that a trial shows.
        time_s: when a gain was learned last; what was learned fades from then on.
    """

    gain: LinearEvidence = field(default_factory=LinearEvidence)
    training: TrainingSums = field(default_factory=TrainingSums)
    shown: ShareEvidence = field(default_factory=ShareEvidence)
    time_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Charge:
    """Device-seconds spent on adaptation at a time."""

    time_s: float
    device_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityRecord:
    """Newest parity check; ``broken_in_row`` counts how often it has been broken until now."""

    version: str
    time_s: float
    evidence: ParityEvidence
    broken_in_row: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BackOff:
    """Updates of one sort that ended without a gain.

    Attributes:
        ended_s: end of the newest.
        in_row: how many were shown not to pay since the last that gained; at least 1 after any other without a gain.
        drop: share-weighted drop at the newest.
        wasted_s: device-seconds that it cost.
    """

    ended_s: float = 0.0
    in_row: int = 0
    drop: float = 0.0
    wasted_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyState:
    """What the rule has learned and remembers.

    Attributes:
        decisions: decisions taken; numbers the next one.
        charges: of the last hour.
        changes_attributed: detector reports that a parity check has looked into.
        ended_s: end of the newest update; 0 before any.
        cooldown_s: plain cool-down of its arm.
        training, restoring: back-off of arms that train, and of those that restore an earlier version: how often one
            of them failed says nothing about the other.
        barred_until_s: until when versions that proved broken while they served, or could not be used, are left alone.
        comparisons: of stored versions with the one that served, the newest last.
        score: device-seconds of a parity check.
        pair: device-seconds of replaying one conversation with two versions.
    """

    arms: dict[str, ArmEvidence] = field(default_factory=dict)
    score: MeanSums = field(default_factory=MeanSums)
    pair: MeanSums = field(default_factory=MeanSums)
    stall: MeanSums = field(default_factory=MeanSums)
    parity: ParityRecord | None = None
    decisions: int = 0
    charges: tuple[Charge, ...] = ()
    changes_attributed: int = 0
    ended_s: float = 0.0
    cooldown_s: float = 0.0
    training: BackOff = field(default_factory=BackOff)
    restoring: BackOff = field(default_factory=BackOff)
    barred_until_s: dict[str, float] = field(default_factory=dict)
    comparisons: tuple[Comparison, ...] = ()

    def back_off(self, arm: Arm) -> BackOff:
        """That of the sort that ``arm`` is of."""
        return self.restoring if arm.restores else self.training

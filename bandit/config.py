"""Configuration of the bandit: frozen, validated, units in the names. The daemon builds these from YAML."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


def _require(ok: bool, path: str, rule: str, value: object) -> None:
    if not ok:
        raise ValueError(f"{path} must be {rule}, got {value!r}")


def _positive(path: str, **values: float) -> None:
    for name, value in values.items():
        _require(math.isfinite(value) and value > 0, f"{path}.{name}", "a finite number above 0", value)


def _not_negative(path: str, **values: float) -> None:
    for name, value in values.items():
        _require(math.isfinite(value) and value >= 0, f"{path}.{name}", "a finite number of at least 0", value)


def _fraction(path: str, **values: float) -> None:
    for name, value in values.items():
        _require(0 < value < 1, f"{path}.{name}", "strictly between 0 and 1", value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to update the drafter; ``steps == 0`` is the arm that does nothing.

    Gains are relative savings of device-seconds per committed token: ``1 - s_new / s_old``.
    The expected gain of a domain whose acceptance fell by ``drop`` is ``prior_gain_mean + drop_recovery * drop``.
    """

    name: str
    patterns: tuple[str, ...] = ()
    """Parameter names to train, shell-style wildcards."""
    steps: int = 0
    learning_rate: float = 0.0
    matrix_rate: float = 0.0
    """Rate of the hidden matrices under orthogonalised momentum (Muon); 0: they take ``learning_rate`` as the rest."""
    positions_per_step: int = 2048
    """Training positions one step is expected to process; replaced by what is measured."""
    prior_s_per_position: float = 1e-4
    """Device-seconds one training position is expected to cost; replaced by what is measured."""
    prior_gain_mean: float = 0.0
    prior_gain_sd: float = 0.02
    drop_recovery: float = 0.4
    """Share of an observed drop of acceptance that the arm is expected to win back."""
    drop_recovery_sd: float = 0.15
    probe_gain_share: float = 0.5
    """Share of the final gain that is expected to be visible after the micro-profile."""
    cooldown_s: float = 60.0
    """No further update starts for this long after one of this arm ended."""

    def __post_init__(self) -> None:
        path = f"policy.arms[{self.name}]"
        _require(bool(self.name), "policy.arms.name", "a non-empty name", self.name)
        _require(self.steps >= 0, f"{path}.steps", "at least 0", self.steps)
        _not_negative(
            path, cooldown_s=self.cooldown_s, drop_recovery_sd=self.drop_recovery_sd, matrix_rate=self.matrix_rate
        )
        _require(math.isfinite(self.prior_gain_mean), f"{path}.prior_gain_mean", "finite", self.prior_gain_mean)
        if self.steps == 0:
            return
        _require(bool(self.patterns), f"{path}.patterns", "a list of at least one parameter pattern", self.patterns)
        _positive(
            path,
            learning_rate=self.learning_rate,
            positions_per_step=self.positions_per_step,
            prior_s_per_position=self.prior_s_per_position,
            prior_gain_sd=self.prior_gain_sd,
        )
        _require(0 <= self.drop_recovery <= 1, f"{path}.drop_recovery", "between 0 and 1", self.drop_recovery)
        _require(0 < self.probe_gain_share <= 1, f"{path}.probe_gain_share", "in (0, 1]", self.probe_gain_share)


def default_arms() -> tuple[Arm, ...]:
    """Skip, retrain the draft head, retrain the whole drafter: the arms of the paper."""
    return (
        Arm(name="skip"),
        Arm(name="head", patterns=("*head*", "norm.*"), steps=20, learning_rate=2e-3),
        Arm(
            name="full",
            patterns=("*",),
            steps=40,
            learning_rate=8e-4,
            matrix_rate=0.02,
            prior_s_per_position=4e-4,
            prior_gain_sd=0.03,
            drop_recovery=0.6,
            drop_recovery_sd=0.2,
            cooldown_s=900.0,
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CostConfig:
    """Prices in device-seconds and the weak priors of what has not been measured yet."""

    price: float = 1.0
    """Serving device-seconds that one training, scoring or probing device-second is worth (0: truly idle)."""
    interference: float = 0.1
    """Serving device-seconds lost per second of training on the same machine."""
    serving_devices: float = 1.0
    prior_score_s: float = 2.0
    """Device-seconds one paired replay of held-out conversations is expected to cost."""
    prior_stall_s: float = 0.1
    """Serving stall of one swap."""
    prior_strength: float = 1.0
    """Weight of every prior cost, in observations."""
    prior_relative_sd: float = 0.5
    """Relative uncertainty of a prior cost."""

    def __post_init__(self) -> None:
        path = "policy.cost"
        _not_negative(path, price=self.price, interference=self.interference)
        _not_negative(path, prior_score_s=self.prior_score_s, prior_stall_s=self.prior_stall_s)
        _positive(path, serving_devices=self.serving_devices, prior_strength=self.prior_strength)
        _positive(path, prior_relative_sd=self.prior_relative_sd)


@dataclass(frozen=True, slots=True, kw_only=True)
class HorizonConfig:
    """How long a gain is expected to last: gamma prior of the regime's hazard, discount and cap."""

    hazard_prior_changes: float = 1.0
    hazard_prior_s: float = 3600.0
    discount_per_s: float = 0.0
    cap_s: float = 3600.0

    def __post_init__(self) -> None:
        path = "policy.horizon"
        _positive(path, hazard_prior_changes=self.hazard_prior_changes, hazard_prior_s=self.hazard_prior_s)
        _positive(path, cap_s=self.cap_s)
        _not_negative(path, discount_per_s=self.discount_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorConfig:
    """Page-Hinkley on blocks of cycles; delta and threshold count standard deviations of the signal."""

    block_cycles: int = 32
    min_blocks: int = 10
    delta_sd: float = 0.25
    threshold_sd: float = 15.0

    def __post_init__(self) -> None:
        path = "policy.detector"
        _require(self.block_cycles >= 1, f"{path}.block_cycles", "at least 1", self.block_cycles)
        _require(self.min_blocks >= 2, f"{path}.min_blocks", "at least 2", self.min_blocks)
        _not_negative(path, delta_sd=self.delta_sd)
        _positive(path, threshold_sd=self.threshold_sd)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityConfig:
    """Live acceptance against exact replay of the serving version."""

    tolerance: float = 0.01
    """Relative difference of pooled acceptance that counts as broken when it is also significant."""
    confidence: float = 0.99
    min_rows: int = 8
    min_cycles: int = 200
    every_s: float = 600.0
    """A check at least this often while traffic flows."""
    valid_s: float = 120.0
    """A result this old is repeated before anything is trained."""
    retry_s: float = 60.0
    """Time between checks while parity is broken."""

    def __post_init__(self) -> None:
        path = "policy.parity"
        _fraction(path, tolerance=self.tolerance, confidence=self.confidence)
        _require(self.min_rows >= 2, f"{path}.min_rows", "at least 2", self.min_rows)
        _require(self.min_cycles >= 1, f"{path}.min_cycles", "at least 1", self.min_cycles)
        _positive(path, every_s=self.every_s, valid_s=self.valid_s, retry_s=self.retry_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """When a candidate may serve, and when its realised gain is measured."""

    alpha: float = 0.05
    """Probability of passing a candidate that saves nothing, over all looks together."""
    clip: float = 0.5
    """Savings are clipped at this share of the old version's cost per token."""
    min_conversations: int = 12
    max_conversations: int = 400
    first_look_requests: int = 16
    """Requests finished after the training cut-off before the first look."""
    look_growth: float = 1.5
    """Each further look waits until this factor more requests have finished."""
    deadline_s: float = 900.0
    """Undecided after this long: rejected and charged."""
    max_domain_loss: float = 0.05
    """No domain may become slower by more than this share."""
    domain_min_conversations: int = 5
    verify_requests: int = 16
    """Requests under the new version before its parity is checked."""
    settle_requests: int = 64
    """Requests under the new version before its realised gain is measured."""
    settle_deadline_s: float = 3600.0

    def __post_init__(self) -> None:
        path = "policy.gate"
        _fraction(path, alpha=self.alpha, max_domain_loss=self.max_domain_loss)
        _positive(path, clip=self.clip, deadline_s=self.deadline_s, settle_deadline_s=self.settle_deadline_s)
        _require(self.look_growth > 1, f"{path}.look_growth", "above 1", self.look_growth)
        for name in ("min_conversations", "first_look_requests", "domain_min_conversations", "verify_requests"):
            _require(getattr(self, name) >= 1, f"{path}.{name}", "at least 1", getattr(self, name))
        _require(
            self.max_conversations >= self.min_conversations,
            f"{path}.max_conversations",
            "at least min_conversations",
            self.max_conversations,
        )
        _require(
            self.settle_requests >= self.verify_requests,
            f"{path}.settle_requests",
            "at least verify_requests",
            self.settle_requests,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsConfig:
    """Forgetting and bounds of the statistics."""

    half_life_cycles: float = 4096.0
    window_events: int = 64
    """Segments in the recent window of a domain and version."""
    rate_half_life_s: float = 120.0
    min_window_cycles: int = 128
    """A window below this says nothing about acceptance."""
    reference_cycles: int = 512
    """Cycles that acceptance must be sustained for to become a reference."""
    max_domains: int = 64
    max_versions: int = 8
    """Versions remembered per domain."""
    max_strata: int = 32
    """Sampling classes times batch bands remembered per domain."""
    max_incarnations: int = 64
    gap_patience: int = 1024
    """A missing sequence number this far behind the newest is a counted loss."""

    def __post_init__(self) -> None:
        path = "policy.statistics"
        _positive(path, half_life_cycles=self.half_life_cycles, rate_half_life_s=self.rate_half_life_s)
        for name in (
            "window_events",
            "min_window_cycles",
            "reference_cycles",
            "max_domains",
            "max_versions",
            "max_strata",
            "max_incarnations",
            "gap_patience",
        ):
            _require(getattr(self, name) >= 1, f"{path}.{name}", "at least 1", getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """Everything a decision depends on, except what is measured."""

    arms: tuple[Arm, ...] = field(default_factory=default_arms)
    confidence: float = 0.9
    """Of the one lower confidence bound that decides."""
    probe_fraction: float = 0.1
    """Share of an arm's steps in the micro-profile."""
    min_drop: float = 0.03
    """Relative drop of acceptance below which nothing is called drift."""
    drop_z: float = 2.0
    """Standard errors by which a drop must exceed 0 to be called drift."""
    min_train_windows: int = 32
    min_heldout_windows: int = 8
    budget_device_s_per_hour: float = 600.0
    """Adaptation may spend this many device-seconds in any hour."""
    backoff_factor: float = 2.0
    """Each abandoned update in a row multiplies the cool-down by this."""
    backoff_max_s: float = 6 * 3600.0
    evidence_growth: float = 1.5
    """A drop grown by this factor since the last abandoned update ends the back-off (not the plain cool-down)."""
    reference_acceptance: float = 0.0
    """Acceptance length the drafter reached in training; 0: unknown."""
    cost: CostConfig = field(default_factory=CostConfig)
    horizon: HorizonConfig = field(default_factory=HorizonConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    parity: ParityConfig = field(default_factory=ParityConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        _require(len(set(names)) == len(names), "policy.arms", "named differently", names)
        _require(any(arm.steps == 0 for arm in self.arms), "policy.arms", "such that one does nothing (steps 0)", names)
        _fraction("policy", probe_fraction=self.probe_fraction, min_drop=self.min_drop)
        _require(0.5 <= self.confidence < 1, "policy.confidence", "in [0.5, 1)", self.confidence)
        _not_negative("policy", drop_z=self.drop_z, budget_device_s_per_hour=self.budget_device_s_per_hour)
        _not_negative("policy", reference_acceptance=self.reference_acceptance)
        _positive("policy", backoff_max_s=self.backoff_max_s)
        _require(self.backoff_factor >= 1, "policy.backoff_factor", "at least 1", self.backoff_factor)
        _require(self.evidence_growth >= 1, "policy.evidence_growth", "at least 1", self.evidence_growth)
        for name in ("min_train_windows", "min_heldout_windows"):
            _require(getattr(self, name) >= 1, f"policy.{name}", "at least 1", getattr(self, name))

    def arm(self, name: str) -> Arm:
        """The arm of that name.

        Raises:
            ValueError: if there is none.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise ValueError(f"policy.arms has no arm {name!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """The Redis stream of acceptance events."""

    url: str
    """redis://, rediss:// or unix:// address."""
    name: str = "{specblock}:events"
    """Braces keep the stream and its parked twin in one cluster slot."""
    group: str = "bandit"
    consumer: str = "bandit-0"
    """Stable over restarts, so a restarted service finds its own unacknowledged entries."""
    max_entries: int = 100_000
    max_parked: int = 1_000
    claim_idle_s: float = 60.0
    """Entries another consumer left unacknowledged for this long are taken over at start."""
    socket_timeout_s: float = 5.0
    block_max_s: float = 2.0
    attempts: int = 4
    """Tries of one read or acknowledgement before it is reported as unavailable."""
    backoff_s: float = 0.05
    backoff_max_s: float = 1.0

    def __post_init__(self) -> None:
        path = "stream"
        schemes = ("redis://", "rediss://", "unix://")
        _require(self.url.startswith(schemes), f"{path}.url", "an address starting with " + " or ".join(schemes), "***")
        for name in ("name", "group", "consumer"):
            _require(bool(getattr(self, name)), f"{path}.{name}", "a non-empty name", getattr(self, name))
        for name in ("max_entries", "max_parked", "attempts"):
            _require(getattr(self, name) >= 1, f"{path}.{name}", "at least 1", getattr(self, name))
        _positive(path, socket_timeout_s=self.socket_timeout_s, block_max_s=self.block_max_s)
        _not_negative(path, claim_idle_s=self.claim_idle_s, backoff_s=self.backoff_s, backoff_max_s=self.backoff_max_s)
        # A blocking read that outlives the socket's timeout is repeated silently by redis-py instead of returning.
        _require(
            self.socket_timeout_s > self.block_max_s + 2,
            f"{path}.socket_timeout_s",
            "more than block_max_s + 2 s",
            self.socket_timeout_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """Pace and places of the service loop."""

    directory: str
    """Holds the snapshots and the ledger."""
    decide_every_s: float = 10.0
    decide_every_events: int = 16
    """New events without which nothing new is decided."""
    read_count: int = 512
    block_s: float = 0.5
    snapshot_every_s: float = 1.0
    """Acknowledgements wait for a snapshot; this bounds how often one is written for events alone."""
    keep_snapshots: int = 2
    ledger_sync_every_s: float = 60.0
    """Repeated identical skips reach the disk at least this often; everything else at once."""

    def __post_init__(self) -> None:
        path = "bandit"
        _require(bool(self.directory), f"{path}.directory", "a folder", self.directory)
        _not_negative(path, decide_every_s=self.decide_every_s, block_s=self.block_s)
        _not_negative(path, snapshot_every_s=self.snapshot_every_s, ledger_sync_every_s=self.ledger_sync_every_s)
        _require(self.decide_every_events >= 1, f"{path}.decide_every_events", "at least 1", self.decide_every_events)
        _require(self.read_count >= 1, f"{path}.read_count", "at least 1", self.read_count)
        _require(self.keep_snapshots >= 2, f"{path}.keep_snapshots", "at least 2", self.keep_snapshots)

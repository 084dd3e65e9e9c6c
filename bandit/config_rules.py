"""Sections of the decision rule's configuration: cost, horizon, exploration, detector, parity, gate and statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass

from specblock.bandit.config_checks import at_least, fraction, not_negative, positive, require


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
        not_negative(path, price=self.price, interference=self.interference)
        not_negative(path, prior_score_s=self.prior_score_s, prior_stall_s=self.prior_stall_s)
        positive(path, serving_devices=self.serving_devices, prior_strength=self.prior_strength)
        positive(path, prior_relative_sd=self.prior_relative_sd)


@dataclass(frozen=True, slots=True, kw_only=True)
class HorizonConfig:
    """How long a gain is expected to last: gamma prior of the regime's hazard, discount and cap."""

    hazard_prior_changes: float = 1.0
    hazard_prior_s: float = 3600.0
    discount_per_s: float = 0.0
    cap_s: float = 3600.0

    def __post_init__(self) -> None:
        path = "policy.horizon"
        positive(path, hazard_prior_changes=self.hazard_prior_changes, hazard_prior_s=self.hazard_prior_s)
        positive(path, cap_s=self.cap_s)
        not_negative(path, discount_per_s=self.discount_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExploreConfig:
    """Micro-profiles of arms that are expected to pay, but not surely enough."""

    every_s: float = 6 * 3600.0
    """An arm that stays near the margin is tried about this often, at least a minute; 0: never."""
    seed: int = 0
    """Of the draws; give each of several daemons its own."""

    def __post_init__(self) -> None:
        not_negative("policy.explore", every_s=self.every_s)
        # Below that, what is meant as a chance would be a certainty.
        require(self.every_s == 0 or self.every_s >= 60, "policy.explore.every_s", "0 or at least 60", self.every_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorConfig:
    """Page-Hinkley on blocks of cycles; delta and threshold count standard deviations of the signal."""

    block_cycles: int = 32
    min_blocks: int = 10
    delta_sd: float = 0.25
    threshold_sd: float = 15.0

    def __post_init__(self) -> None:
        path = "policy.detector"
        at_least(path, 1, block_cycles=self.block_cycles)
        at_least(path, 2, min_blocks=self.min_blocks)
        not_negative(path, delta_sd=self.delta_sd)
        positive(path, threshold_sd=self.threshold_sd)


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
    """Time between checks while parity is broken; doubles with every check that finds it still broken."""
    max_share: float = 0.001
    """Share of serving time that regular checks, and looks at whether a fault has gone, may cost; where one is dear
    they come less often than ``every_s``. A fault that moves acceptance is looked into at once all the same."""

    def __post_init__(self) -> None:
        path = "policy.parity"
        fraction(path, tolerance=self.tolerance, confidence=self.confidence, max_share=self.max_share)
        at_least(path, 2, min_rows=self.min_rows)
        at_least(path, 1, min_cycles=self.min_cycles)
        positive(path, every_s=self.every_s, valid_s=self.valid_s, retry_s=self.retry_s)


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
    deadline_s: float = 3600.0
    """Undecided after this long: rejected. The text that a candidate is made for may be away for a while; as soon as
    other text needs an update the wait ends."""
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
        fraction(path, alpha=self.alpha, max_domain_loss=self.max_domain_loss)
        positive(path, clip=self.clip, deadline_s=self.deadline_s, settle_deadline_s=self.settle_deadline_s)
        require(1 < self.look_growth < math.inf, f"{path}.look_growth", "finite and above 1", self.look_growth)
        at_least(
            path,
            1,
            min_conversations=self.min_conversations,
            first_look_requests=self.first_look_requests,
            domain_min_conversations=self.domain_min_conversations,
            verify_requests=self.verify_requests,
        )
        require(
            self.max_conversations >= self.min_conversations,
            f"{path}.max_conversations",
            "at least min_conversations",
            self.max_conversations,
        )
        require(
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
        positive(path, half_life_cycles=self.half_life_cycles, rate_half_life_s=self.rate_half_life_s)
        at_least(
            path,
            1,
            window_events=self.window_events,
            min_window_cycles=self.min_window_cycles,
            reference_cycles=self.reference_cycles,
            max_domains=self.max_domains,
            max_versions=self.max_versions,
            max_strata=self.max_strata,
            max_incarnations=self.max_incarnations,
            gap_patience=self.gap_patience,
        )

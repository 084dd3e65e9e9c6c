"""Configuration of the bandit: frozen, validated, units in the names. The daemon builds these from YAML.

This file holds the decision rule's own numbers and gathers the rest, so that callers import from one place.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from specblock.bandit.config_arms import Arm, default_arms
from specblock.bandit.config_checks import at_least, fraction, not_negative, positive, require
from specblock.bandit.config_rules import (
    CostConfig,
    DetectorConfig,
    ExploreConfig,
    GateConfig,
    HorizonConfig,
    ParityConfig,
    StatisticsConfig,
)
from specblock.bandit.config_service import ServiceConfig, StreamConfig

__all__ = [
    "Arm",
    "CostConfig",
    "DetectorConfig",
    "ExploreConfig",
    "GateConfig",
    "HorizonConfig",
    "ParityConfig",
    "PolicyConfig",
    "ServiceConfig",
    "StatisticsConfig",
    "StreamConfig",
    "default_arms",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """Everything a decision depends on, except what is measured."""

    arms: tuple[Arm, ...] = field(default_factory=default_arms)
    confidence: float = 0.9
    """Of the one lower confidence bound that decides."""
    probe_fraction: float = 0.1
    """Share of an arm's steps in the micro-profile."""
    probe_conversations: int = 32
    """Held-out conversations, about, on which a micro-profile is judged."""
    min_drop: float = 0.03
    """Relative drop of acceptance below which nothing is called drift."""
    drop_z: float = 2.0
    """Standard errors by which a drop must exceed 0 to be called drift."""
    min_train_windows: int = 32
    min_heldout_windows: int = 8
    budget_device_s_per_hour: float = 600.0
    """Adaptation may spend this many device-seconds in any hour."""
    waste_share: float = 0.03
    """Share of serving time that updates without a gain may cost: the next one waits until the last is below it."""
    backoff_factor: float = 2.0
    """Each update in a row that was shown not to pay multiplies that wait, and the cool-down, by this."""
    backoff_max_s: float = 6 * 3600.0
    evidence_growth: float = 1.5
    """A drop grown by this factor since the last abandoned update ends the back-off (not the plain cool-down)."""
    evidence_half_life_s: float = 2 * 3600.0
    """What an arm gained counts half after this long: traffic that has moved on may have more to win than it had."""
    reference_acceptance: float = 0.0
    """Acceptance length the drafter reached in training; 0: unknown."""
    cost: CostConfig = field(default_factory=CostConfig)
    horizon: HorizonConfig = field(default_factory=HorizonConfig)
    explore: ExploreConfig = field(default_factory=ExploreConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    parity: ParityConfig = field(default_factory=ParityConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        require(len(set(names)) == len(names), "policy.arms", "named differently", names)
        require(not all(arm.acts for arm in self.arms), "policy.arms", "such that one does nothing (steps 0)", names)
        fraction("policy", probe_fraction=self.probe_fraction, min_drop=self.min_drop, waste_share=self.waste_share)
        require(0.5 <= self.confidence < 1, "policy.confidence", "in [0.5, 1)", self.confidence)
        not_negative("policy", drop_z=self.drop_z, budget_device_s_per_hour=self.budget_device_s_per_hour)
        not_negative("policy", reference_acceptance=self.reference_acceptance)
        positive("policy", backoff_max_s=self.backoff_max_s, evidence_half_life_s=self.evidence_half_life_s)
        at_least("policy", 1, backoff_factor=self.backoff_factor, evidence_growth=self.evidence_growth)
        at_least("policy", 2, probe_conversations=self.probe_conversations)
        at_least("policy", 1, min_train_windows=self.min_train_windows, min_heldout_windows=self.min_heldout_windows)

    def arm(self, name: str) -> Arm:
        """The arm of that name.

        Raises:
            ValueError: if there is none.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise ValueError(f"policy.arms has no arm {name!r}")

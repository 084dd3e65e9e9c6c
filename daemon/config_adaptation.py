"""The adaptation section: when drafter updates are considered, what they may cost and what an update must prove."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator

from specblock.daemon.config_types import Count, Fraction, Seconds, Section, Strings


class ArmConfig(Section):
    """One way to update the drafter: which parameters train, for how long and how fast."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")
    """Lower-case name, used in the ledger, in metrics and in version names."""
    patterns: Strings = Field(min_length=1)
    """Shell-style patterns of the drafter's parameter names; the rest stays frozen."""
    steps: Count
    """Optimiser steps of one update."""
    learning_rate: float = Field(gt=0, le=1)
    """Step size of the optimiser at its peak."""


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


DEFAULT_ARMS = (
    ArmConfig(name="rank_head", patterns=("rank_head.*",), steps=20, learning_rate=1e-3),
    ArmConfig(name="head", patterns=("lm_head.*", "norm.*", "rank_head.*"), steps=40, learning_rate=5e-4),
    ArmConfig(name="full", patterns=("*",), steps=60, learning_rate=3e-4),
)


class AdaptationConfig(Section):
    """The decision rule: an update runs only when its expected gain exceeds everything it costs."""

    enabled: bool = True
    """false: acceptance is measured, nothing is trained."""
    decide_every_s: Seconds = 30.0
    """Longest time between two decisions, in seconds."""
    decide_every_events: Count = 32
    """A decision is due after this many acceptance events, if that comes first."""
    arms: Annotated[tuple[ArmConfig, ...], BeforeValidator(_tuple)] = DEFAULT_ARMS
    """The updates to choose from; skipping is always a choice."""
    price_train: float = Field(default=1.0, ge=0, le=100)
    """What one second of the trainer's device costs in seconds of a serving device; 0 if it is truly idle."""
    interference: Fraction = 0.2
    """Share of serving speed lost while an update trains on the same machine (first guess, then measured)."""
    horizon_s: Seconds = 1800.0
    """Longest time over which a gain may pay its cost back, in seconds."""
    cooldown_s: float = Field(default=30.0, ge=0)
    """Shortest time between the ends of one update and the start of the next, in seconds."""
    budget_device_s_per_hour: float = Field(default=900.0, ge=0, le=3600 * 64)
    """Most device-seconds per hour that training, scoring and probing may use."""
    min_heldout_conversations: int = Field(default=8, ge=2)
    """Held-out conversations a candidate must be judged on."""
    parity_tolerance: float = Field(default=0.1, gt=0, le=1)
    """Relative gap between live and replayed acceptance above which something is broken, not drifting."""
    gate_alpha: float = Field(default=0.1, gt=0, lt=0.5)
    """Chance that a candidate which is no better passes the gate."""
    max_domain_loss: Fraction = 0.05
    """Largest relative loss that any one domain may suffer from an update."""
    probe_fraction: float = Field(default=0.01, ge=0, le=0.1)
    """Share of device time that may be spent on measuring choices not in use."""

    @field_validator("arms")
    @classmethod
    def _distinct(cls, arms: tuple[ArmConfig, ...]) -> tuple[ArmConfig, ...]:
        names = [arm.name for arm in arms]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"two arms are called {', '.join(repeated)}")
        if reserved := sorted({"skip", "base"} & set(names)):
            raise ValueError(f"the name {', '.join(reserved)} is reserved")
        return arms

"""The adaptation section: when drafter updates are considered, what they may cost and what an update must prove.

The everyday knobs are named here; ``policy`` reaches every other number of ``specblock.bandit.config.PolicyConfig``.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from specblock.bandit.config import (
    Arm,
    CostConfig,
    GateConfig,
    HorizonConfig,
    ParityConfig,
    PolicyConfig,
    default_arms,
)
from specblock.bandit.config_arms import COUNTED, COUNTED_PAIRS
from specblock.daemon.config_types import Count, Fraction, Seconds, Section, Strings

OpenFraction = Annotated[float, Field(gt=0, lt=1)]
_PRIOR: dict[str, Any] = {field.name: field.default for field in fields(Arm)}
_NAMED_ABOVE = {"arms": "adaptation.arms", "budget_device_s_per_hour": "adaptation.budget_device_s_per_hour"}


class ArmConfig(Section):
    """One way to update the drafter: which parameters train, for how long, how fast, and what to expect of it.

    One with restores: true trains nothing; an earlier version serves again where that is expected to be better.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")
    """Lower-case name, used in the ledger, in metrics and in version names."""
    restores: bool = False
    """true: an earlier version serves again; patterns, steps and learning_rate are left out."""
    patterns: Strings = ()
    """Shell-style patterns of the drafter's parameter names; the rest stays frozen. token_bias.*, alone, is counted,
    and so is token_pairs.*, alone or beside what is trained."""
    steps: int = Field(default=0, ge=0)
    """Optimiser steps of one update; for token_bias and token_pairs alone batches that are counted."""
    learning_rate: float = Field(default=0.0, ge=0, le=1)
    """Step size of the optimiser at its peak; for token_bias the share of the counted difference that is taken over;
    left out for token_pairs alone."""
    matrix_rate: float = Field(default=0.0, ge=0, le=1)
    """Peak step size of Muon, which then moves the hidden matrices; 0: AdamW moves them too."""
    blend: float = Field(default=_PRIOR["blend"], gt=0, le=1)
    """Share of the way from the weights it starts at to the trained ones that is taken; less forgets less."""
    cooldown_s: float | None = Field(default=None, ge=0)
    """Seconds without updates after one of this arm; null takes adaptation.cooldown_s."""
    prior_s_per_position: float = Field(default=_PRIOR["prior_s_per_position"], gt=0)
    """First guess of device-seconds per training position; replaced by what is measured."""
    prior_gain_sd: float = Field(default=_PRIOR["prior_gain_sd"], gt=0)
    """First guess of how much the relative saving of an update varies."""
    drop_recovery: Fraction = _PRIOR["drop_recovery"]
    """First guess of the share of a drop in acceptance that the update wins back."""
    drop_recovery_sd: float = Field(default=_PRIOR["drop_recovery_sd"], gt=0, le=1)
    """How sure that guess is: its standard deviation."""
    probe_gain_share: float = Field(default=_PRIOR["probe_gain_share"], gt=0, le=1)
    """Share of the complete update's gain that its trial is expected to show already."""
    probe_gain_share_sd: float = Field(default=_PRIOR["probe_gain_share_sd"], gt=0, le=1)
    """How sure that share is: its standard deviation."""

    @field_validator("patterns")
    @classmethod
    def _counted_alone(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        if any(pattern.startswith("token_bias") for pattern in patterns) and patterns != COUNTED:
            raise ValueError("token_bias.* is counted, not trained, and whole: give it an arm of its own")
        if any(pattern.startswith("token_") and (pattern,) not in (COUNTED, COUNTED_PAIRS) for pattern in patterns):
            raise ValueError("token_pairs.* is counted, not trained, and whole: write it so")
        return patterns

    @model_validator(mode="after")
    def _trains_or_restores(self) -> ArmConfig:
        given = [name for name in ("patterns", "steps", "learning_rate") if getattr(self, name)]
        if self.restores and given:
            raise ValueError(f"restores an earlier version and trains nothing: leave out {', '.join(given)}")
        if self.blend < 1 and (self.restores or self.patterns in (COUNTED, COUNTED_PAIRS)):
            raise ValueError("trains no weights, so there is nothing to blend: leave out blend")
        needed = ["patterns", "steps"] + (["learning_rate"] if self.patterns != COUNTED_PAIRS else [])
        missing = [name for name in needed if name not in given]
        if not self.restores and missing:
            raise ValueError(f"trains, so it needs {', '.join(missing)} (or restores: true)")
        return self

    def arm(self, cooldown_s: float, positions_per_step: int) -> Arm:
        """The bandit's view of this arm."""
        return Arm(
            name=self.name,
            restores=self.restores,
            patterns=self.patterns,
            steps=self.steps,
            learning_rate=self.learning_rate,
            matrix_rate=self.matrix_rate,
            blend=self.blend,
            positions_per_step=positions_per_step,
            prior_s_per_position=self.prior_s_per_position,
            prior_gain_sd=self.prior_gain_sd,
            drop_recovery=self.drop_recovery,
            drop_recovery_sd=self.drop_recovery_sd,
            probe_gain_share=self.probe_gain_share,
            probe_gain_share_sd=self.probe_gain_share_sd,
            cooldown_s=cooldown_s if self.cooldown_s is None else self.cooldown_s,
        )


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _default(arm: Arm) -> ArmConfig:
    """A default arm as the operator would write it; its cool-down is the section's."""
    written = set(ArmConfig.model_fields) - {"cooldown_s"}
    return ArmConfig(**{name: getattr(arm, name) for name in written})


DEFAULT_ARMS = tuple(_default(arm) for arm in default_arms() if arm.acts)


class AdaptationConfig(Section):
    """The decision rule: an update runs only when its expected gain exceeds everything it costs."""

    enabled: bool = True
    """false: acceptance is measured, nothing is trained."""
    decide_every_s: Seconds = 30.0
    """Longest time between two decisions, in seconds."""
    decide_every_events: Count = 32
    """New acceptance events without which nothing new is decided."""
    arms: Annotated[tuple[ArmConfig, ...], BeforeValidator(_tuple)] = DEFAULT_ARMS
    """The updates to choose from; skipping is always a choice."""
    price_train: float = Field(default=1.0, ge=0, le=100)
    """What one second of the trainer's device costs in seconds of a serving device; 0 if it is truly idle."""
    interference: Fraction = 0.2
    """Serving device-seconds lost per second of training on the same machine."""
    horizon_s: Seconds = 1800.0
    """Longest time over which a gain may pay its cost back, in seconds."""
    cooldown_s: float = Field(default=30.0, ge=0)
    """Shortest time between the end of one update and the start of the next, in seconds."""
    budget_device_s_per_hour: float = Field(default=900.0, ge=0, le=3600 * 64)
    """Most device-seconds per hour that training, scoring and probing may use."""
    min_heldout_conversations: int = Field(default=8, ge=1, le=400)
    """Held-out conversations a candidate must be judged on."""
    parity_tolerance: OpenFraction = 0.02
    """Relative gap between live and replayed acceptance that, when significant, means broken and not drifting."""
    gate_alpha: float = Field(default=0.1, gt=0, lt=0.5)
    """Chance that a candidate which is no better passes the gate."""
    max_domain_loss: OpenFraction = 0.05
    """Largest relative loss that any one domain may suffer from an update."""
    probe_fraction: OpenFraction = 0.1
    """Share of an arm's steps that run as a trial before the rest is paid."""
    policy: dict[str, Any] = Field(default_factory=dict)
    """Every other number of the decision rule, by its name in the bandit's PolicyConfig; {} keeps its defaults."""

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

    @model_validator(mode="after")
    def _policy_holds(self) -> AdaptationConfig:
        self.policy_config(positions_per_step=1)
        return self

    def policy_config(self, positions_per_step: int) -> PolicyConfig:
        """The bandit's configuration.

        Args:
            positions_per_step: training positions one optimiser step is expected to process.

        Raises:
            ValueError: ``policy`` holds an unknown name or a bad value; the message starts with its path.
        """
        plain = PolicyConfig(
            arms=(Arm(name="skip"), *(arm.arm(self.cooldown_s, positions_per_step) for arm in self.arms)),
            probe_fraction=self.probe_fraction,
            min_heldout_windows=self.min_heldout_conversations,
            budget_device_s_per_hour=self.budget_device_s_per_hour,
            cost=CostConfig(price=self.price_train, interference=self.interference),
            horizon=HorizonConfig(cap_s=self.horizon_s),
            parity=ParityConfig(tolerance=self.parity_tolerance),
            gate=GateConfig(
                alpha=self.gate_alpha,
                min_conversations=self.min_heldout_conversations,
                max_domain_loss=self.max_domain_loss,
            ),
        )
        changed: PolicyConfig = _with_overrides(plain, self.policy, "adaptation.policy")
        return changed


def _with_overrides(owner: Any, overrides: dict[str, Any], path: str) -> Any:
    """``owner`` (a frozen dataclass) with nested values replaced, each checked against the type it replaces."""
    known = {field.name: getattr(owner, field.name) for field in fields(owner) if field.name not in _NAMED_ABOVE}
    changes: dict[str, Any] = {}
    for name, value in overrides.items():
        where = f"{path}.{name}"
        if name in _NAMED_ABOVE and path == "adaptation.policy":
            raise ValueError(f"{where}: set {_NAMED_ABOVE[name]} instead")
        if name not in known:
            raise ValueError(f"{where}: unknown key; this section knows {', '.join(known)}")
        current = known[name]
        if is_dataclass(current):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: must be a section with {', '.join(f.name for f in fields(current))}")
            changes[name] = _with_overrides(current, value, where)
        elif isinstance(value, bool) or not isinstance(value, int if isinstance(current, int) else int | float):
            raise ValueError(f"{where}: must be a {'whole ' if isinstance(current, int) else ''}number (got {value!r})")
        else:
            changes[name] = type(current)(value)
    try:
        return replace(owner, **changes)
    except ValueError as error:
        # The bandit names the field it refuses, as in "policy.gate.alpha must be ...".
        name = str(error).partition(" ")[0].rpartition(".")[2]
        raise ValueError(f"{path}.{name}: {str(error).partition(' ')[2]}") from None

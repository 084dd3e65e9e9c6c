"""The arms: ways to update the drafter, as data. The only place where the default ones stand."""

from __future__ import annotations

import math
from dataclasses import dataclass

from specblock.bandit.config_checks import at_least, not_negative, positive, require

COUNTED, COUNTED_PAIRS = ("token_bias.*",), ("token_pairs.*",)
"""Patterns of arms that count, tokens or pairs of them, instead of training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to update the drafter; one that neither trains nor restores is the arm that does nothing.

    Gains are relative savings of device-seconds per committed token: ``1 - s_new / s_old``.
    The expected gain of a domain whose acceptance fell by ``drop`` is ``prior_gain_mean + drop_recovery * drop``.
    """

    name: str
    patterns: tuple[str, ...] = ()
    """Parameter names to train, shell-style wildcards; ``token_bias.*``, alone, is counted instead, and so is
    ``token_pairs.*``, alone or beside what is trained."""
    steps: int = 0
    restores: bool = False
    """Nothing is trained: an earlier version serves again. Its trial shows all it gains, and its cost is comparing."""
    learning_rate: float = 0.0
    matrix_rate: float = 0.0
    """Rate of the hidden matrices under orthogonalised momentum (Muon); 0: they take ``learning_rate`` as the rest."""
    blend: float = 1.0
    """Share of the way from the weights it starts at to the trained ones that is taken: about half keeps most of what
    an update learned and forgets a fraction of what it would (after Wortsman et al., Robust fine-tuning, CVPR 2022)."""
    positions_per_step: int = 2048
    """Training positions one step is expected to process; replaced by what is measured."""
    prior_s_per_position: float = 1e-4
    """Device-seconds one training position is expected to cost; replaced by what is measured."""
    prior_gain_mean: float = 0.0
    prior_gain_sd: float = 0.02
    drop_recovery: float = 0.4
    """Share of an observed drop of acceptance that the arm is expected to win back."""
    drop_recovery_sd: float = 0.2
    probe_gain_share: float = 0.2
    """Share of the final gain that is expected to be visible after the micro-profile; replaced by what is measured."""
    probe_gain_share_sd: float = 0.1
    """Uncertainty of that share."""
    cooldown_s: float = 60.0
    """No further update starts for this long after one of this arm ended."""

    def __post_init__(self) -> None:
        path = f"policy.arms[{self.name}]"
        require(bool(self.name), "policy.arms.name", "a non-empty name", self.name)
        at_least(path, 0, steps=self.steps)
        not_negative(
            path, cooldown_s=self.cooldown_s, drop_recovery_sd=self.drop_recovery_sd, matrix_rate=self.matrix_rate
        )
        require(math.isfinite(self.prior_gain_mean), f"{path}.prior_gain_mean", "finite", self.prior_gain_mean)
        if not self.acts:
            return
        if self.restores:
            require(self.steps == 0, f"{path}.steps", "0, as nothing is trained", self.steps)
            require(not self.patterns, f"{path}.patterns", "empty, as nothing is trained", self.patterns)
        else:
            require(bool(self.patterns), f"{path}.patterns", "a list of at least one parameter pattern", self.patterns)
            if self.patterns != COUNTED_PAIRS:
                positive(path, learning_rate=self.learning_rate)
            positive(
                path,
                positions_per_step=self.positions_per_step,
                prior_s_per_position=self.prior_s_per_position,
            )
        require(0 < self.blend <= 1, f"{path}.blend", "above 0 and at most 1", self.blend)
        trains = not self.restores and not self.counts
        require(trains or self.blend == 1, f"{path}.blend", "1, as no weights are trained", self.blend)
        positive(path, prior_gain_sd=self.prior_gain_sd)
        require(0 <= self.drop_recovery <= 1, f"{path}.drop_recovery", "between 0 and 1", self.drop_recovery)
        positive(path, probe_gain_share_sd=self.probe_gain_share_sd)
        require(0 < self.probe_gain_share <= 1, f"{path}.probe_gain_share", "in (0, 1]", self.probe_gain_share)

    @property
    def counts(self) -> bool:
        """Whether it counts instead of training."""
        return self.patterns in (COUNTED, COUNTED_PAIRS)

    @property
    def acts(self) -> bool:
        """Whether it does anything."""
        return self.steps > 0 or self.restores


def default_arms() -> tuple[Arm, ...]:
    """Skip, go back, count tokens, retrain the draft head, retrain the whole drafter: the paper's arms and two more."""
    return (
        Arm(name="skip"),
        Arm(name="restore", restores=True, prior_gain_sd=0.05),
        Arm(
            name="statistics",
            patterns=COUNTED,
            steps=10,
            learning_rate=1.0,
            prior_gain_sd=0.01,
            drop_recovery=0.08,
            drop_recovery_sd=0.04,
            probe_gain_share=0.5,
            probe_gain_share_sd=0.2,
        ),
        Arm(name="head", patterns=("*head*", "norm.*", *COUNTED_PAIRS), steps=20, learning_rate=2e-3),
        Arm(
            name="full",
            patterns=("*",),
            steps=40,
            learning_rate=8e-4,
            matrix_rate=0.02,
            blend=0.5,
            prior_s_per_position=4e-4,
            prior_gain_sd=0.03,
            drop_recovery=0.6,
        ),
    )

"""Numbers for short runs: the rule of the demo's policy, without its file."""

from __future__ import annotations

from dataclasses import replace

from specblock.bandit.config import (
    Arm,
    CostConfig,
    GateConfig,
    HorizonConfig,
    ParityConfig,
    PolicyConfig,
)
from specblock.bandit.simulation.curves import Curves, demo_curves

CURVES = demo_curves()

POLICY = PolicyConfig(
    arms=(
        Arm(name="skip"),
        Arm(
            name="head",
            patterns=("*head*",),
            steps=20,
            learning_rate=2e-3,
            positions_per_step=512,
            prior_s_per_position=2e-3,
            drop_recovery=0.15,
            cooldown_s=5.0,
        ),
        Arm(
            name="full",
            patterns=("*",),
            steps=24,
            learning_rate=8e-4,
            positions_per_step=512,
            prior_s_per_position=5e-3,
            prior_gain_sd=0.03,
            drop_recovery=0.5,
            cooldown_s=5.0,
        ),
    ),
    probe_fraction=0.15,
    min_heldout_windows=8,
    budget_device_s_per_hour=3600.0,
    cost=CostConfig(interference=0.2),
    horizon=HorizonConfig(hazard_prior_s=14400.0, cap_s=14400.0),
    parity=ParityConfig(tolerance=0.02),
    gate=GateConfig(alpha=0.1, min_conversations=8),
)


def cheap(curves: Curves = CURVES, **factors: float) -> Curves:
    """Curves whose training and replaying cost a fraction, so that short runs hold whole updates."""
    arms = {name: replace(arm, train_s=arm.train_s * factors.get("train", 0.1)) for name, arm in curves.arms.items()}
    return replace(curves, arms=arms, replay_s_per_token=curves.replay_s_per_token * factors.get("replay", 0.1))

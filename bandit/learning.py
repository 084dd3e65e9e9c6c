"""How the policy's state takes in what actions measured. Pure: every function returns the next state."""

from __future__ import annotations

import math
from dataclasses import replace

from specblock.bandit.actions import TrainReport
from specblock.bandit.config import Arm
from specblock.bandit.decision import ArmEvidence, Charge, ParityRecord, PolicyState, Target
from specblock.bandit.estimate import GAIN_NOISE_SD
from specblock.bandit.gate import Saving
from specblock.bandit.parity import ParityEvidence


def charge(state: PolicyState, now_s: float, device_s: float) -> PolicyState:
    """Book device-seconds against the hourly budget."""
    return replace(state, charges=(*state.charges, Charge(now_s, device_s))) if device_s > 0 else state


def learn_training(state: PolicyState, arm: Arm, fraction: float, report: TrainReport) -> PolicyState:
    """Learn an arm's device-seconds per position from a run of ``fraction`` of its steps."""
    evidence = state.arms.get(arm.name, ArmEvidence())
    training = evidence.training.observe(arm.steps * fraction, report.positions, report.device_s)
    return _with_arm(state, arm, replace(evidence, training=training))


def learn_score(state: PolicyState, device_s: float) -> PolicyState:
    """Learn what a comparison or parity check costs."""
    return replace(state, score=state.score.observe(device_s))


def learn_stall(state: PolicyState, stall_s: float) -> PolicyState:
    """Learn how long a swap stalls serving."""
    return replace(state, stall=state.stall.observe(stall_s))


def learn_gain(
    state: PolicyState, arm: Arm, targets: tuple[Target, ...], saving: Saving, seen: float = 1.0
) -> PolicyState:
    """Learn, domain by domain, what an update by ``arm`` saved at the drop it was made for.

    Args:
        state: before.
        arm: what was done.
        targets: domains it was made for.
        saving: measured.
        seen: share of a complete update's gain that the measurement is expected to show.
    """
    evidence = state.arms.get(arm.name, ArmEvidence())
    measured = {domain.domain: domain for domain in saving.domains if domain.conversations > 1}
    gain = evidence.gain
    for target in targets:
        if found := measured.get(target.domain):
            noise_sd = math.hypot(found.se / seen, GAIN_NOISE_SD)
            gain = gain.observe(max(target.drop, 0.0), found.saving / seen, noise_sd)
    return _with_arm(state, arm, replace(evidence, gain=gain))


def learn_parity(
    state: PolicyState, version: str, now_s: float, evidence: ParityEvidence, num_changes: int
) -> PolicyState:
    """Remember a parity check; one with a verdict attributes the changes reported until now."""
    seen = state.changes_attributed if evidence.verdict == "insufficient" else num_changes
    before = state.parity.broken_in_row if state.parity is not None and state.parity.version == version else 0
    broken = {"broken": before + 1, "insufficient": before}.get(evidence.verdict, 0)
    return replace(
        state,
        parity=ParityRecord(version=version, time_s=now_s, evidence=evidence, broken_in_row=broken),
        changes_attributed=seen,
    )


def end_update(state: PolicyState, arm: Arm, now_s: float, drop: float, *, gained: bool) -> PolicyState:
    """Start the cool-down after an update; one without a gain lengthens the back-off."""
    return replace(
        state,
        ended_s=now_s,
        cooldown_s=arm.cooldown_s,
        abandoned_in_row=0 if gained else state.abandoned_in_row + 1,
        abandoned_drop=0.0 if gained else drop,
    )


def _with_arm(state: PolicyState, arm: Arm, evidence: ArmEvidence) -> PolicyState:
    return replace(state, arms={**state.arms, arm.name: evidence})

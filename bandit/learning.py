"""How the policy's state takes in what actions measured. Pure: every function returns the next state."""

from __future__ import annotations

from dataclasses import replace

from specblock.bandit.actions import TrainReport
from specblock.bandit.config import Arm
from specblock.bandit.decision import ArmEvidence, Charge, ParityRecord, PolicyState
from specblock.bandit.parity import INSUFFICIENT, ParityResult

GAIN_NOISE_SD = 0.01
"""Variation of an arm's gain from one update to the next, beyond the measurement's own error."""


def charge(state: PolicyState, now_s: float, device_s: float) -> PolicyState:
    """Book device-seconds against the hourly budget."""
    return replace(state, charges=(*state.charges, Charge(now_s, device_s))) if device_s > 0 else state


def learn_seconds(state: PolicyState, arm: Arm, report: TrainReport) -> PolicyState:
    """Learn an arm's device-seconds per position; a run counts by its share of a complete update."""
    if report.positions <= 0:
        return state
    weight = min(1.0, report.positions / (arm.steps * arm.positions_per_step))
    evidence = state.arms.get(arm.name, ArmEvidence())
    seconds = evidence.seconds.observe(report.device_s / report.positions, weight)
    return _with_arm(state, arm, replace(evidence, seconds=seconds))


def learn_score(state: PolicyState, device_s: float) -> PolicyState:
    """Learn what a comparison costs."""
    return replace(state, score=state.score.observe(device_s))


def learn_stall(state: PolicyState, stall_s: float) -> PolicyState:
    """Learn how long a swap stalls serving."""
    return replace(state, stall=state.stall.observe(stall_s))


def learn_gain(state: PolicyState, arm: Arm, share: float, drop: float, gain: float, se: float) -> PolicyState:
    """Learn the saving over all traffic that a complete update by ``arm`` gave at a share-weighted ``drop``."""
    evidence = state.arms.get(arm.name, ArmEvidence())
    noise_sd = (se**2 + GAIN_NOISE_SD**2) ** 0.5
    return _with_arm(state, arm, replace(evidence, gain=evidence.gain.observe(share, drop, gain, noise_sd)))


def learn_parity(state: PolicyState, version: str, now_s: float, result: ParityResult, num_changes: int) -> PolicyState:
    """Remember a parity check; one with a verdict attributes the changes reported until now."""
    seen = state.changes_attributed if result.verdict == INSUFFICIENT else num_changes
    record = ParityRecord(version=version, time_s=now_s, result=result)
    return replace(state, parity=record, changes_attributed=seen)


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

"""How the policy's state takes in what actions measured. Pure: every function returns the next state."""

from __future__ import annotations

import math
from dataclasses import replace

from specblock.bandit.actions import TrainReport
from specblock.bandit.config import Arm, PolicyConfig
from specblock.bandit.cost import Belief
from specblock.bandit.decision import ArmEvidence, BackOff, Charge, Comparison, ParityRecord, PolicyState, Target
from specblock.bandit.estimate import FEWEST_COMPARED, GAIN_LUCK, GAIN_NOISE_SD, WHOLE
from specblock.bandit.forecast import faded
from specblock.bandit.gate import Saving
from specblock.bandit.parity import ParityEvidence
from specblock.bandit.reach import reachable_drop

MAX_BARRED = MAX_COMPARISONS = 64


def charge(state: PolicyState, now_s: float, device_s: float) -> PolicyState:
    """Book device-seconds against the hourly budget."""
    return replace(state, charges=(*state.charges, Charge(now_s, device_s))) if device_s > 0 else state


def learn_training(state: PolicyState, arm: Arm, fraction: float, report: TrainReport) -> PolicyState:
    """Learn an arm's device-seconds per position from a run of ``fraction`` of its steps."""
    evidence = state.arms.get(arm.name, ArmEvidence())
    training = evidence.training.observe(arm.steps * fraction, report.positions, report.device_s)
    return _with_arm(state, arm, replace(evidence, training=training))


def learn_score(state: PolicyState, device_s: float) -> PolicyState:
    """Learn what a parity check costs."""
    return replace(state, score=state.score.observe(device_s))


def learn_pairs(state: PolicyState, pairs: int, device_s: float) -> PolicyState:
    """Learn what replaying one conversation with two versions costs."""
    return replace(state, pair=state.pair.observe(device_s / pairs)) if pairs > 0 else state


def learn_stall(state: PolicyState, stall_s: float) -> PolicyState:
    """Learn how long a swap stalls serving."""
    return replace(state, stall=state.stall.observe(stall_s))


def learn_gain(
    state: PolicyState,
    arm: Arm,
    targets: tuple[Target, ...],
    saving: Saving,
    config: PolicyConfig,
    now_s: float,
    seen: Belief = WHOLE,
    version: str = "",
) -> PolicyState:
    """Learn, domain by domain, what an update by ``arm`` saved at the drop it was made for.

    Args:
        state: before.
        arm: what was done.
        targets: domains it was made for.
        saving: measured.
        config: what counts as a drop, and how fast evidence fades.
        now_s: time of the measurement.
        seen: share of a complete update's gain that the measurement is expected to show.
        version: what was restored. Where it has served before, its gain was known, and says nothing about versions of
            which nothing is.
    """
    evidence = faded(state, now_s, config).arms.get(arm.name, ArmEvidence())
    measured = {domain.domain: domain for domain in saving.domains if domain.conversations > 1}
    gain = evidence.gain
    for target in targets:
        known = bool(version) and target.level(version) is not None
        if (found := measured.get(target.domain)) and not known:
            drop = reachable_drop(arm, target, config)
            # A share known only roughly blurs what a trial says about a gain as large as the arm may have.
            expected = max(arm.prior_gain_mean + arm.drop_recovery * drop, abs(found.saving) / seen.mean)
            varies = math.hypot(seen.sd / seen.mean, GAIN_LUCK) * expected
            noise_sd = math.hypot(found.se / seen.mean, varies, GAIN_NOISE_SD)
            gain = gain.observe(drop, found.saving / seen.mean, noise_sd)
    return _with_arm(state, arm, replace(evidence, gain=gain, time_s=now_s))


def learn_comparison(state: PolicyState, version: str, against: str, saving: Saving, now_s: float) -> PolicyState:
    """Remember what a stored version saved against the serving one, domain by domain; the newest of each pair stays."""
    new = tuple(
        Comparison(version=version, against=against, domain=d.domain, saving=d.saving, se=d.se, time_s=now_s)
        for d in saving.domains
        if d.conversations >= FEWEST_COMPARED
    )
    again = {one.domain for one in new}
    others = (c for c in state.comparisons if (c.version, c.against) != (version, against) or c.domain not in again)
    return replace(state, comparisons=(*others, *new)[-MAX_COMPARISONS:])


def learn_shown(
    state: PolicyState, arm: Arm, targets: tuple[Target, ...], trial: Saving, complete: Saving
) -> PolicyState:
    """Learn from a trial and the complete update after it what share of the gain the trial showed."""
    evidence = state.arms.get(arm.name, ArmEvidence())
    wanted = {target.domain for target in targets}
    early, late = (
        {d.domain: Belief(mean=d.saving, sd=d.se) for d in one.domains if d.conversations > 1 and d.domain in wanted}
        for one in (trial, complete)
    )
    shown = evidence.shown
    for domain in sorted(early.keys() & late.keys()):
        shown = shown.observe(early[domain], late[domain])
    return _with_arm(state, arm, replace(evidence, shown=shown))


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


def learn_barred(state: PolicyState, version: str, now_s: float, for_s: float) -> PolicyState:
    """Keep a version from being restored for a while."""
    kept = {name: until_s for name, until_s in state.barred_until_s.items() if until_s > now_s and name != version}
    newest = dict(list(kept.items())[-MAX_BARRED + 1 :])
    return replace(state, barred_until_s={**newest, version: now_s + for_s})


def end_update(
    state: PolicyState,
    arm: Arm,
    now_s: float,
    drop: float,
    *,
    gained: bool,
    decided: bool = True,
    spent_s: float = 0.0,
) -> PolicyState:
    """Start the cool-down after an update; one without a gain begins a back-off, by what it has cost.

    Args:
        state: before.
        arm: what was done.
        now_s: its end.
        drop: that it was made for, weighted with shares of traffic.
        gained: it serves, and nothing spoke against it.
        decided: without a gain, it was shown that it would not have paid. One that was given up while it might have
            paid says little about the next one: what it has cost is waited off, but the back-off does not double.
        spent_s: device-seconds that it has cost.
    """
    before = state.back_off(arm).in_row
    in_row = before + 1 if decided else max(before, 1)
    after = BackOff() if gained else BackOff(ended_s=now_s, in_row=in_row, drop=drop, wasted_s=spent_s)
    state = replace(state, restoring=after) if arm.restores else replace(state, training=after)
    return replace(state, ended_s=now_s, cooldown_s=arm.cooldown_s)


def _with_arm(state: PolicyState, arm: Arm, evidence: ArmEvidence) -> PolicyState:
    return replace(state, arms={**state.arms, arm.name: evidence})

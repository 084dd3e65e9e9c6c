"""What the decision rule does when its forecast is the measurement, for a ladder of expected regime lengths. Pure.

Nothing here decides: every answer is ``bandit.policy.decide``'s. This file only writes measured gains and costs where
the rule keeps its forecasts: gains into the arms' priors, costs into the evidence that the daemon would have learned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from specblock.bandit.config import PolicyConfig
from specblock.bandit.decision import (
    PROBE,
    DecisionContext,
    DomainContext,
    ParityRecord,
    PolicyState,
    Probed,
)
from specblock.bandit.estimate import GAIN_NOISE_SD
from specblock.bandit.learning import learn_pairs, learn_score, learn_stall, learn_training
from specblock.bandit.parity import ParityEvidence
from specblock.bandit.policy import decide
from specblock.daemon.breakeven import Update

LADDER_S = (300.0, 900.0, 3600.0, 14_400.0, 86_400.0)
"""5 minutes, 15 minutes, 1 hour, 4 hours, 1 day."""
_NOW_S = 1e6
_LONGEST_S = 365 * 86_400.0
_CAPS = 50.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What the rule would see at rest: one kind of text makes up all traffic, and one device is busy with it.

    Attributes:
        acceptance: of the serving version.
        reference: what acceptance should be; a lower one counts as a drop.
        num_train, num_heldout: conversations at hand.
        parity: the measured parity check of the serving version.
    """

    domain: str
    version: str
    acceptance: float
    reference: float
    s_per_token: float
    cycles: int
    num_train: int
    num_heldout: int
    parity: ParityEvidence


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRung:
    """One arm at one regime length, as if it were the only one.

    Attributes:
        regime_s: expected seconds of busy serving until the traffic changes.
        action: probe (train) or skip.
        after_trial: continue or abandon, decided again with what the trial measured; empty if there was no trial.
        net_s, net_lower_s: predicted net value and the lower bound that decides.
    """

    domain: str
    arm: str
    regime_s: float
    action: str
    after_trial: str
    net_s: float
    net_lower_s: float
    cost_s: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """The choice between all arms at one regime length, with the measured forecast and with the policy's guesses."""

    domain: str
    regime_s: float
    action: str
    arm: str
    net_s: float
    guessed_action: str
    guessed_arm: str


def informed(config: PolicyConfig, updates: Sequence[Update]) -> tuple[PolicyConfig, PolicyState]:
    """Rule and state whose forecasts for one kind of text are what ``updates`` measured.

    Gains keep the uncertainty that the rule itself gives to a measured gain; an arm without a measurement is left out.
    """
    state, arms = PolicyState(), [arm for arm in config.arms if arm.steps == 0]
    for update in updates:
        saving, reports = update.saving(), (update.probe, update.rest)
        positions = sum(r.positions for r in reports)
        arm = config.arm(update.arm)
        known = replace(
            arm,
            prior_gain_mean=saving.relative,
            prior_gain_sd=math.hypot(saving.se, GAIN_NOISE_SD),
            drop_recovery=0.0,
            drop_recovery_sd=0.0,
            positions_per_step=max(1, round(positions / arm.steps)),
            prior_s_per_position=sum(r.device_s for r in reports) / positions,
        )
        arms.append(known)
        shares = (config.probe_fraction, 1 - config.probe_fraction)
        for share, report in zip(shares, reports, strict=True):
            state = learn_training(state, known, share, report)
        state = learn_stall(learn_score(state, update.score_s), update.stall_s)
        for replayed in (update.trial, update.final):
            state = learn_pairs(state, len(replayed.rows), replayed.device_s)
    scores = [u.score_s for u in updates]
    stalls = [u.stall_s for u in updates]
    cost = replace(config.cost, prior_score_s=sum(scores) / len(scores), prior_stall_s=sum(stalls) / len(stalls))
    return replace(config, arms=tuple(arms), cost=cost), state


def expecting(config: PolicyConfig, regime_s: float) -> PolicyConfig:
    """The rule told that traffic changes once in ``regime_s`` seconds; the policy's own cap is lifted."""
    horizon = replace(
        config.horizon, hazard_prior_changes=1.0, hazard_prior_s=regime_s, discount_per_s=0.0, cap_s=_CAPS * regime_s
    )
    return replace(config, horizon=horizon)


def arm_rung(situation: Situation, update: Update, config: PolicyConfig, regime_s: float) -> ArmRung:
    """What the rule decides about one arm alone, at rest and after its trial."""
    rule, state = informed(config, [update])
    rule, state = expecting(rule, regime_s), _checked(state, situation)
    context = context_of(situation)
    decision, _ = decide(context, state, rule)
    value, blocked = decision.options[0].value, decision.options[0].blocked
    after = ""
    if decision.action == PROBE:
        probed = Probed(arm=update.arm, targets=decision.targets, saving=update.saving(trial=True))
        after = decide(replace(context, probed=probed), state, rule)[0].action
    return ArmRung(
        domain=situation.domain,
        arm=update.arm,
        regime_s=regime_s,
        action=decision.action,
        after_trial=after,
        net_s=value.net,
        net_lower_s=value.net_lower,
        cost_s=value.cost,
        reason=blocked or decision.reason,
    )


def cost_of(situation: Situation, update: Update, config: PolicyConfig) -> float:
    """Device-seconds that the rule charges a complete update with, when its forecasts are the measurements."""
    return arm_rung(situation, update, config, LADDER_S[0]).cost_s


def rung(situation: Situation, updates: Sequence[Update], config: PolicyConfig, regime_s: float) -> Rung:
    """What the rule decides when it may choose between all arms."""
    rule, state = informed(config, updates)
    context = context_of(situation)
    chosen, _ = decide(context, _checked(state, situation), expecting(rule, regime_s))
    guessed, _ = decide(context, _checked(PolicyState(), situation), expecting(config, regime_s))
    option = chosen.option()
    return Rung(
        domain=situation.domain,
        regime_s=regime_s,
        action=chosen.action,
        arm=chosen.arm,
        net_s=option.value.net if option else 0.0,
        guessed_action=guessed.action,
        guessed_arm=guessed.arm,
    )


def trains_from_s(situation: Situation, update: Update, config: PolicyConfig) -> float | None:
    """The shortest expected regime at which the rule trains with this arm; None: not even for a year's.

    Its lower bound rises with the regime or never passes 0, so halving the (logarithmic) range finds the line.
    """

    def trains(regime_s: float) -> bool:
        return arm_rung(situation, update, config, regime_s).action == PROBE

    low, high = 1.0, _LONGEST_S
    if not trains(high):
        return None
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if trains(middle) else (middle, high)
    return high


def context_of(situation: Situation) -> DecisionContext:
    """The rule's input at rest."""
    drop = max(0.0, 1 - situation.acceptance / situation.reference) if situation.reference > 0 else 0.0
    domain = DomainContext(
        domain=situation.domain,
        share=1.0,
        acceptance=situation.acceptance,
        reference=situation.reference,
        drop=drop,
        drop_se=0.0,
        raw_drop=drop,
        cycles=situation.cycles,
        device_s_per_token=situation.s_per_token,
        measurable=True,
        num_train=situation.num_train,
        num_heldout=situation.num_heldout,
    )
    return DecisionContext(
        now_s=_NOW_S,
        serving_version=situation.version,
        domains=(domain,),
        busy_devices=1.0,
        num_changes=0,
        observed_s=0.0,
    )


def _checked(state: PolicyState, situation: Situation) -> PolicyState:
    """With the parity check just made: a due one would be the rule's first wish."""
    return replace(state, parity=ParityRecord(version=situation.version, time_s=_NOW_S, evidence=situation.parity))

"""Predicted gain and cost of an arm, before and after its micro-profile. Pure."""

from __future__ import annotations

import math

from specblock.bandit.config import Arm, PolicyConfig
from specblock.bandit.cost import (
    Belief,
    CostTerms,
    DomainGain,
    NetValue,
    mean_seconds,
    net_value,
    training_seconds,
    update_belief,
)
from specblock.bandit.decision import ArmEvidence, DecisionContext, PolicyState, Probed, Target
from specblock.bandit.estimate import GAIN_NOISE_SD, LinearPrior
from specblock.bandit.intervals import one_sided_z

COMPARISONS = 4
"""Paired replays of a complete update: micro-profile, two looks at the gate, realised gain."""

COMPARISONS_AFTER_PROBE = 3


def targets(context: DecisionContext) -> tuple[Target, ...]:
    """Domains that training can reach: recent traffic, and conversations to train on."""
    return tuple(
        Target(domain=d.domain, share=d.share, drop=d.drop, drop_se=d.drop_se)
        for d in context.domains
        if d.measurable and d.num_train > 0
    )


def mean_drop(reached: tuple[Target, ...]) -> float:
    """Share-weighted drop of acceptance."""
    return math.fsum(target.share * max(target.drop, 0.0) for target in reached)


def domain_weights(reached: tuple[Target, ...], min_drop: float) -> dict[str, float]:
    """How much of an update's training each domain should get: where most of the traffic has most to win back.

    A domain at its reference still counts with ``min_drop``, below which a drop is not told from noise.
    """
    return {target.domain: target.share * max(target.drop, min_drop) for target in reached}


def domain_gain(arm: Arm, target: Target, state: PolicyState) -> DomainGain:
    """Relative saving that a complete update by ``arm`` is expected to give in one domain."""
    evidence = state.arms.get(arm.name, ArmEvidence())
    prior = LinearPrior(arm.prior_gain_mean, arm.prior_gain_sd, arm.drop_recovery, arm.drop_recovery_sd)
    gain = evidence.gain.predict(max(target.drop, 0.0), prior)
    sd = math.hypot(gain.sd, arm.drop_recovery * target.drop_se)
    return DomainGain(domain=target.domain, share=target.share, mean=gain.mean, sd=sd)


def probed_gain(arm: Arm, target: Target, state: PolicyState, probed: Probed) -> DomainGain:
    """The same, with what the micro-profile measured; a domain it could not measure keeps its prediction."""
    before = domain_gain(arm, target, state)
    measured = next((d for d in probed.saving.domains if d.domain == target.domain and d.conversations > 1), None)
    if measured is None:
        return before
    seen = arm.probe_gain_share
    # Few conversations may agree by chance (cycles are whole numbers), and a trial is not yet the complete update.
    measured_sd = math.hypot(measured.se / seen, GAIN_NOISE_SD)
    after = update_belief(Belief(mean=before.mean, sd=before.sd), measured.saving / seen, measured_sd)
    return DomainGain(domain=target.domain, share=target.share, mean=after.mean, sd=after.sd)


def complete_value(arm: Arm, context: DecisionContext, state: PolicyState, config: PolicyConfig) -> NetValue:
    """Net value of a complete update, micro-profile and gate included."""
    gains = tuple(domain_gain(arm, target, state) for target in targets(context))
    return _value(arm, gains, config.probe_fraction, COMPARISONS, context, state, config)


def remaining_value(
    arm: Arm, probed: Probed, context: DecisionContext, state: PolicyState, config: PolicyConfig
) -> NetValue:
    """Net value of what is left after a micro-profile; what it cost is sunk."""
    gains = tuple(probed_gain(arm, target, state, probed) for target in probed.targets)
    return _value(arm, gains, 0.0, COMPARISONS_AFTER_PROBE, context, state, config)


def train_s(arm: Arm, fraction: float, state: PolicyState, config: PolicyConfig) -> Belief:
    """Device-seconds that ``fraction`` of the arm's steps will take."""
    training = state.arms.get(arm.name, ArmEvidence()).training
    return training_seconds(training, arm, fraction, config.probe_fraction, config.cost)


def score_s(state: PolicyState, config: PolicyConfig) -> Belief:
    """Device-seconds of one comparison or parity check."""
    return mean_seconds(state.score, config.cost.prior_score_s, config.cost)


def hazard_per_s(context: DecisionContext, config: PolicyConfig) -> float:
    """Posterior mean rate of traffic changes: gamma prior, changes the detectors reported, time observed."""
    prior = config.horizon
    return (prior.hazard_prior_changes + context.num_changes) / (prior.hazard_prior_s + context.observed_s)


def _value(
    arm: Arm,
    gains: tuple[DomainGain, ...],
    probe_fraction: float,
    comparisons: int,
    context: DecisionContext,
    state: PolicyState,
    config: PolicyConfig,
) -> NetValue:
    score = score_s(state, config)
    terms = CostTerms(
        train=train_s(arm, 1 - config.probe_fraction, state, config),
        probe=train_s(arm, probe_fraction, state, config) if probe_fraction else Belief(mean=0.0, sd=0.0),
        score=Belief(mean=comparisons * score.mean, sd=comparisons * score.sd),
        stall=mean_seconds(state.stall, config.cost.prior_stall_s, config.cost),
    )
    return net_value(
        arm.name,
        gains,
        terms,
        busy_devices=context.busy_devices,
        hazard_per_s=hazard_per_s(context, config),
        z=one_sided_z(config.confidence),
        cost=config.cost,
        horizon=config.horizon,
    )

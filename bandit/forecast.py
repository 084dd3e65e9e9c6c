"""Predicted gain and cost of an arm, before and after its micro-profile. Pure."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

from specblock.bandit.config import Arm, PolicyConfig
from specblock.bandit.cost import (
    Belief,
    CostTerms,
    DomainGain,
    NetValue,
    horizon_value_s,
    mean_seconds,
    net_value,
    training_seconds,
    update_belief,
)
from specblock.bandit.decision import (
    ArmEvidence,
    DecisionContext,
    PolicyState,
    Probed,
    Target,
)
from specblock.bandit.estimate import GAIN_LUCK, GAIN_NOISE_SD, WHOLE, LinearPrior
from specblock.bandit.gate import Saving
from specblock.bandit.intervals import one_sided_z
from specblock.bandit.past import best_past, past_gain
from specblock.bandit.reach import reachable_drop, targets, told_drop
from specblock.bandit.trend import growth

PAIRED_SD = 0.09
"""Relative scatter of what a complete update saves from one conversation to the next, as every machine showed it."""

LOOK_WIDTH = 3.0
"""Half-width of the gate's confidence sequence, in standard errors of the mean saving, at the sizes that decide."""

SETTLED_SHARE = 0.3
"""Share of the requests after a promotion, about, that are held out and thus replayed to measure its realised gain."""

TYPICAL_PAIRS = 16
"""Conversations that the configured first guess of a scoring's cost is about."""


def faded(state: PolicyState, now_s: float, config: PolicyConfig) -> PolicyState:
    """The state with what the arms gained weighing less the longer ago it was learned."""
    arms = {}
    for name, evidence in state.arms.items():
        kept = math.exp2(-max(now_s - evidence.time_s, 0.0) / config.evidence_half_life_s)
        arms[name] = replace(evidence, gain=evidence.gain.faded(kept))
    return replace(state, arms=arms)


def domain_gain(
    arm: Arm, target: Target, state: PolicyState, config: PolicyConfig, version: str = "", base: str = ""
) -> DomainGain:
    """Relative saving that a complete update by ``arm`` is expected to give in one domain.

    ``version``: what it would restore. It is judged by the text of now alone: when other text comes back, so can the
    version that serves now. Where nothing is known of it, something is expected of the ``base`` only, which was trained
    for text in general.
    """
    if version and not target.there:
        return DomainGain(domain=target.domain, share=target.share, mean=0.0, sd=0.0)
    if version and (level := target.level(version)) is not None:
        return past_gain(level, target, config)
    if version and version != base:
        return DomainGain(domain=target.domain, share=target.share, mean=0.0, sd=arm.prior_gain_sd)
    evidence = state.arms.get(arm.name, ArmEvidence())
    prior = LinearPrior(arm.prior_gain_mean, arm.prior_gain_sd, arm.drop_recovery, arm.drop_recovery_sd)
    drop = reachable_drop(arm, target, config)
    gain = evidence.gain.predict(drop, prior)
    # The next update may be luckier or less lucky than the mean of all.
    luck = math.hypot(GAIN_NOISE_SD, GAIN_LUCK * gain.mean) if drop else 0.0
    sd = math.hypot(gain.sd, luck, arm.drop_recovery * target.drop_se)
    return DomainGain(domain=target.domain, share=target.share, mean=gain.mean, sd=sd)


def probed_gain(
    arm: Arm, target: Target, state: PolicyState, probed: Probed, config: PolicyConfig, base: str = ""
) -> DomainGain:
    """The same, with what the micro-profile measured; a domain it could not measure keeps its prediction."""
    before = domain_gain(arm, target, state, config, probed.version, base)
    measured = next((d for d in probed.saving.domains if d.domain == target.domain and d.conversations > 1), None)
    if measured is None:
        return before
    seen = shown_share(arm, state)
    # What share of its gain a trial shows is known only roughly: a large gain makes the trial's surprise cheap.
    share_noise = seen.sd * math.hypot(before.mean, before.sd) / seen.mean
    # Few conversations may agree by chance (cycles are whole numbers), and a trial is not yet the complete update.
    measured_sd = math.hypot(measured.se / seen.mean, share_noise, GAIN_NOISE_SD)
    after = update_belief(Belief(mean=before.mean, sd=before.sd), measured.saving / seen.mean, measured_sd)
    return DomainGain(domain=target.domain, share=target.share, mean=after.mean, sd=after.sd)


def shown_share(arm: Arm, state: PolicyState) -> Belief:
    """Share of its complete gain that a trial of ``arm`` shows: the first guess, and the pairs measured since.

    All of it, if what is compared is what would serve.
    """
    if arm.restores:
        return WHOLE
    evidence = state.arms.get(arm.name, ArmEvidence())
    return evidence.shown.belief(Belief(mean=arm.probe_gain_share, sd=arm.probe_gain_share_sd))


def complete_value(
    arm: Arm, context: DecisionContext, state: PolicyState, config: PolicyConfig, version: str = "", instead: str = ""
) -> NetValue:
    """Net value of a complete update, micro-profile and gate included.

    Args:
        arm: trains or restores.
        context, state, config: of the decision.
        version: what it would restore.
        instead: what is about to be restored: training is credited with what it adds to that. Where text has just come
            for which an earlier version is known to be better, that one is as good as restored: shares show it soon.
    """
    reached = targets(context, config)
    gains = tuple(domain_gain(arm, target, state, config, version, context.base) for target in reached)
    if not arm.restores and any(one.restores for one in config.arms):
        gains = tuple(
            replace(gain, mean=gain.mean - _without_training(target, state, config, instead, context.base))
            for gain, target in zip(gains, reached, strict=True)
        )
    return _value(arm, gains, reached, config.probe_fraction, context, state, config)


def _without_training(target: Target, state: PolicyState, config: PolicyConfig, instead: str, base: str) -> float:
    """What restoring is going to save in a domain."""
    if not target.settled:
        return best_past(target, config)
    restores = next(arm for arm in config.arms if arm.restores)
    return domain_gain(restores, target, state, config, instead, base).mean if instead else 0.0


def remaining_value(
    arm: Arm, probed: Probed, context: DecisionContext, state: PolicyState, config: PolicyConfig
) -> NetValue:
    """Net value of what is left after a micro-profile; what it cost is sunk."""
    gains = tuple(probed_gain(arm, target, state, probed, config, context.base) for target in probed.targets)
    return _value(arm, gains, probed.targets, 0.0, context, state, config)


def gate_outlook(value: NetValue, saving: Saving, state: PolicyState, config: PolicyConfig) -> tuple[float, float]:
    """What a candidate at the gate is still expected to bring, and what looking on costs; training is sunk.

    Args:
        value: predicted before the gate.
        saving: measured at the gate so far.
        state: what was learned.
        config: the gate's limits.
    """
    measured = {d.domain: d for d in saving.domains if d.conversations > 1}
    believed = {d.domain: Belief(mean=d.mean, sd=d.sd) for d in value.domains}
    for name, found in measured.items():
        # Looked at again and again, the measurement alone would sooner or later look bad by chance and end it there.
        before = believed.get(name)
        after = update_belief(before, found.saving, found.se) if before else Belief(mean=found.saving, sd=found.se)
        believed[name] = after
    gain = math.fsum(domain.growth * domain.share * believed[domain.domain].mean for domain in value.domains)
    # Only a saving on the conversations as they arrive can pass, and only one that the last look could still tell.
    parts = [(found.conversations, believed[name]) for name, found in measured.items()]
    # Where every kind of text was seen but once, only all together say anything.
    parts = parts or [(1, Belief(mean=saving.relative, sd=saving.se))]
    total = sum(count for count, _ in parts)
    mean = math.fsum(count / total * belief.mean for count, belief in parts)
    sd = math.hypot(*(count / total * belief.sd for count, belief in parts))
    least = LOOK_WIDTH * PAIRED_SD / math.sqrt(config.gate.max_conversations)
    chance = NormalDist().cdf((mean - least) / max(sd, 1e-6))
    more = max(gate_conversations(mean, config) - saving.conversations, config.gate.min_conversations)
    more = min(more, max(config.gate.max_conversations - saving.conversations, 0))
    benefit_s = chance * gain * value.busy_devices * value.horizon_value_s
    return benefit_s, config.cost.price * more * pair_s(state, config).mean


def train_s(arm: Arm, fraction: float, state: PolicyState, config: PolicyConfig) -> Belief:
    """Device-seconds that ``fraction`` of the arm's steps will take."""
    training = state.arms.get(arm.name, ArmEvidence()).training
    return training_seconds(training, arm, fraction, config.probe_fraction, config.cost)


def score_s(state: PolicyState, config: PolicyConfig) -> Belief:
    """Device-seconds of one parity check."""
    return mean_seconds(state.score, config.cost.prior_score_s, config.cost)


def pair_s(state: PolicyState, config: PolicyConfig) -> Belief:
    """Device-seconds of replaying one conversation with two versions."""
    return mean_seconds(state.pair, config.cost.prior_score_s / TYPICAL_PAIRS, config.cost)


def gate_conversations(gain: float, config: PolicyConfig) -> float:
    """Conversations until the gate is expected to tell ``gain`` from none: a small gain is dear to prove."""
    rules = config.gate
    needed = (LOOK_WIDTH * PAIRED_SD / gain) ** 2 if gain > 0 else math.inf
    return min(max(needed, rules.min_conversations), rules.max_conversations)


def hazard_per_s(context: DecisionContext, config: PolicyConfig) -> float:
    """Posterior mean rate of traffic changes: gamma prior, changes the detectors reported, time observed."""
    prior = config.horizon
    return (prior.hazard_prior_changes + context.num_changes) / (prior.hazard_prior_s + context.observed_s)


def _value(
    arm: Arm,
    gains: tuple[DomainGain, ...],
    reached: tuple[Target, ...],
    probe_fraction: float,
    context: DecisionContext,
    state: PolicyState,
    config: PolicyConfig,
) -> NetValue:
    score, pair = score_s(state, config), pair_s(state, config)
    now = math.fsum(gain.share for gain in gains)
    pairs = gate_conversations(math.fsum(g.share * g.mean for g in gains) / now if now > 0 else 0.0, config)
    pairs += config.probe_conversations if probe_fraction else 0
    pairs += SETTLED_SHARE * config.gate.settle_requests
    # What is restored for the text of now serves until other text comes: then something else may be restored.
    lasting = tuple(target.staying_s if arm.restores else target.lasting_s for target in reached)
    # What it is trained for grows, what was made for it once does not.
    growing = tuple(
        target.growing_s if not arm.restores and target.there and told_drop(target, config) > 0 else 0.0
        for target in reached
    )
    lasting_s, gains = _lasting(gains, lasting, growing, config)
    terms = CostTerms(
        train=train_s(arm, 1 - config.probe_fraction, state, config),
        probe=train_s(arm, probe_fraction, state, config) if probe_fraction else Belief(mean=0.0, sd=0.0),
        score=Belief(mean=score.mean + pairs * pair.mean, sd=math.hypot(score.sd, pairs * pair.sd)),
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
        lasting_s=lasting_s,
    )


def _lasting(
    gains: tuple[DomainGain, ...], lasting: tuple[float | None, ...], growing: tuple[float, ...], config: PolicyConfig
) -> tuple[float | None, tuple[DomainGain, ...]]:
    """Expected seconds of the targets' traffic, and the gains with their shares of it; None: nothing is known.

    A gain counts for as much more as the drop is expected to grow that it is in proportion to.
    """
    known = [one_s for one_s in lasting if one_s is not None]
    total_s = math.fsum(known)
    if len(known) < len(lasting) or total_s <= 0:
        return None, gains
    shared = []
    for gain, one_s, drop_s in zip(gains, known, growing, strict=True):
        grown = growth(drop_s, one_s / gain.share if gain.share > 0 else 0.0)
        shared.append(replace(gain, share=one_s / total_s, growth=grown))
    return min(total_s, horizon_value_s(0.0, config.horizon)), tuple(shared)

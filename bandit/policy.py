"""The decision rule: ``(context, state, config) -> (decision, state)``. Pure; everything read is a logged input.

Two stages. At rest: is a micro-profile of an arm worth it? After it, with the gain *measured* on held-out
conversations: is the rest worth it? Both compare one lower confidence bound on the net value with 0.
"""

from __future__ import annotations

import math
from dataclasses import replace

from specblock.bandit.config import Arm, PolicyConfig
from specblock.bandit.cost import Horizon, NetEstimate, UpdateSeconds, horizon, net_estimate
from specblock.bandit.decision import (
    ABANDON,
    CHECK,
    CONTINUE,
    DRIFT,
    FAULT,
    LOAD,
    NONE,
    PROBE,
    SKIP,
    ArmEvidence,
    Decision,
    DecisionContext,
    PolicyState,
)
from specblock.bandit.estimate import LinearPrior, Normal, combine
from specblock.bandit.gain import MeasuredGain
from specblock.bandit.parity import BROKEN, INSUFFICIENT, ParityResult
from specblock.bandit.parity import OK as PARITY_OK

COMPARISONS = 4
"""Paired replays of a complete update: micro-profile, two looks at the gate, realised gain."""

HOUR_S = 3600.0


def decide(context: DecisionContext, state: PolicyState, config: PolicyConfig) -> tuple[Decision, PolicyState]:
    """Take one decision.

    Args:
        context: what is measured now.
        state: what was learned.
        config: the operator's numbers.

    Returns:
        The decision, and the state with the decision counted and expired charges dropped.
    """
    state = replace(
        state,
        decisions=state.decisions + 1,
        charges=tuple(charge for charge in state.charges if charge.time_s > context.now_s - HOUR_S),
    )
    if context.measured is not None:
        return _after_probe(context, context.measured, state, config), state
    return _at_rest(context, state, config), state


def _at_rest(context: DecisionContext, state: PolicyState, config: PolicyConfig) -> Decision:
    verdict, evidence = attribute(context, state, config)
    share, drop = gaining_traffic(context)
    estimates = tuple(_estimate(arm, context, state, config, share, drop) for arm in config.arms if arm.steps > 0)
    best = max((estimate for estimate in estimates if not estimate.blocked), key=lambda e: e.net_lower_s, default=None)

    def answer(action: str, reason: str, arm: str = "") -> Decision:
        return Decision(
            action=action,
            arm=arm,
            verdict=verdict,
            reason=reason,
            estimates=estimates,
            traffic_share=share,
            mean_drop=drop,
        )

    wanted = best is not None and best.net_lower_s > 0
    check = _parity_wanted(context, state, config, wanted)
    if check:
        return answer(CHECK, check)
    parity = _parity_of(context, state)
    if verdict == FAULT:
        return answer(SKIP, evidence)
    if context.num_changes > state.changes_attributed:
        return answer(SKIP, "acceptance changed; the parity check that attributes it is not due yet")
    if best is None or not wanted:
        return answer(SKIP, f"{evidence}; {_why_not(estimates, best)}")
    if parity is None or parity.verdict != PARITY_OK:
        return answer(SKIP, "training would pay, but parity could not be checked yet (too few conversations)")
    return answer(PROBE, f"{evidence}; {_why(best)}", best.arm)


def attribute(context: DecisionContext, state: PolicyState, config: PolicyConfig) -> tuple[str, str]:
    """The verdict on acceptance, and its evidence in words."""
    parity = _parity_of(context, state)
    if parity is not None and parity.verdict == BROKEN:
        return FAULT, (
            f"live acceptance differs from exact replay of {context.serving_version} by {parity.difference:+.1%} "
            f"(interval {parity.lower:+.1%} to {parity.upper:+.1%}, {parity.conversations} conversations): "
            "something is broken, training would not repair it"
        )
    measurable = [domain for domain in context.domains if domain.measurable]
    fallen = [d for d in measurable if d.drop > config.min_drop and d.drop > config.drop_z * d.drop_se]
    if fallen:
        worst = max(fallen, key=lambda d: d.share * d.drop)
        return DRIFT, (
            f"acceptance of {worst.domain} is {worst.acceptance:.2f}, {worst.drop:.0%} below its reference "
            f"{worst.reference:.2f}"
        )
    shifted = [d for d in measurable if d.raw_drop > config.min_drop and d.raw_drop > config.drop_z * d.drop_se]
    if shifted:
        worst = max(shifted, key=lambda d: d.share * d.raw_drop)
        return LOAD, (
            f"acceptance of {worst.domain} is {worst.raw_drop:.0%} lower, but not within the same sampling class and "
            "load: the mix changed, not the drafter's fit"
        )
    if not measurable:
        return NONE, "too little recent traffic to judge acceptance"
    return NONE, "acceptance is at its reference"


def gaining_traffic(context: DecisionContext) -> tuple[float, float]:
    """Share of serving seconds of domains that training can reach, and their share-weighted drop."""
    reached = [d for d in context.domains if d.measurable and d.num_train > 0]
    return math.fsum(d.share for d in reached), math.fsum(d.share * max(d.drop, 0.0) for d in reached)


def _parity_of(context: DecisionContext, state: PolicyState) -> ParityResult | None:
    """The newest parity result, if it is about the version that serves."""
    record = state.parity
    return record.result if record is not None and record.version == context.serving_version else None


def _parity_wanted(context: DecisionContext, state: PolicyState, config: PolicyConfig, wanted: bool) -> str:
    """Why a parity check is due now; empty if none is."""
    rules, record, parity = config.parity, state.parity, _parity_of(context, state)
    if not any(d.measurable for d in context.domains):
        return ""
    age_s = math.inf if record is None or parity is None else context.now_s - record.time_s
    if age_s < rules.retry_s:
        return ""
    if parity is not None and parity.verdict == BROKEN:
        return "parity was broken; looking again"
    if context.num_changes > state.changes_attributed:
        return "acceptance changed; first find out whether something is broken"
    if wanted and (age_s > rules.valid_s or (parity is not None and parity.verdict == INSUFFICIENT)):
        return "training would pay; first make sure that nothing is broken"
    if age_s > rules.every_s:
        return "regular check of live acceptance against exact replay"
    return ""


def _estimate(
    arm: Arm, context: DecisionContext, state: PolicyState, config: PolicyConfig, share: float, drop: float
) -> NetEstimate:
    gain = predict_gain(arm, state, context, share, drop)
    return net_estimate(
        arm.name,
        gain,
        context.busy_fraction,
        _seconds(arm, state, config, COMPARISONS, config.probe_fraction),
        _horizon(context, config),
        config.cost,
        config.confidence,
        _blocked(arm, context, state, config, share, drop),
    )


def predict_gain(arm: Arm, state: PolicyState, context: DecisionContext, share: float, drop: float) -> Normal:
    """Relative saving over all traffic that ``arm`` is expected to give, before anything is measured."""
    evidence = state.arms.get(arm.name, ArmEvidence())
    believed = evidence.gain.predict(share, drop, gain_prior(arm))
    noise = math.sqrt(math.fsum((d.share * d.drop_se) ** 2 for d in context.domains if d.measurable and d.num_train))
    return Normal(believed.mean, math.hypot(believed.sd, arm.drop_recovery * noise))


def gain_prior(arm: Arm) -> LinearPrior:
    """Prior of the two coefficients of ``gain = base * share + recovery * drop``."""
    return LinearPrior(arm.prior_gain_mean, arm.prior_gain_sd, arm.drop_recovery, arm.drop_recovery_sd)


def _seconds(
    arm: Arm, state: PolicyState, config: PolicyConfig, comparisons: int, probe_fraction: float
) -> UpdateSeconds:
    cost = config.cost
    evidence = state.arms.get(arm.name, ArmEvidence())
    per_position = evidence.seconds.predict(arm.prior_s_per_position, cost.prior_strength, cost.prior_relative_sd)
    score = state.score.predict(cost.prior_score_s, cost.prior_strength, cost.prior_relative_sd)
    positions = arm.steps * arm.positions_per_step
    probe, rest = positions * probe_fraction, positions * (1 - config.probe_fraction)
    return UpdateSeconds(
        train=Normal(rest * per_position.mean, rest * per_position.sd),
        probe=Normal(probe * per_position.mean, probe * per_position.sd),
        score=Normal(comparisons * score.mean, comparisons * score.sd),
        stall=state.stall.predict(cost.prior_stall_s, cost.prior_strength, cost.prior_relative_sd),
    )


def predicted_score_s(state: PolicyState, config: PolicyConfig) -> float:
    """Device-seconds that one comparison or parity check is expected to take."""
    cost = config.cost
    return state.score.predict(cost.prior_score_s, cost.prior_strength, cost.prior_relative_sd).mean


def predicted_train_s(arm: Arm, fraction: float, state: PolicyState, config: PolicyConfig) -> float:
    """Device-seconds that ``fraction`` of the arm's steps are expected to take."""
    evidence = state.arms.get(arm.name, ArmEvidence())
    cost = config.cost
    each = evidence.seconds.predict(arm.prior_s_per_position, cost.prior_strength, cost.prior_relative_sd)
    return fraction * arm.steps * arm.positions_per_step * each.mean


def _horizon(context: DecisionContext, config: PolicyConfig) -> Horizon:
    return horizon(config.horizon, context.num_changes, context.observed_s)


def _blocked(
    arm: Arm, context: DecisionContext, state: PolicyState, config: PolicyConfig, share: float, drop: float
) -> str:
    if share <= 0:
        return "no domain has both enough recent traffic and training conversations"
    num_train = sum(d.num_train for d in context.domains)
    num_heldout = sum(d.num_heldout for d in context.domains)
    if num_train < config.min_train_windows:
        return f"{num_train} of {config.min_train_windows} training conversations"
    if num_heldout < config.min_heldout_windows:
        return f"{num_heldout} of {config.min_heldout_windows} held-out conversations"
    wait_s = _cooldown_left_s(context.now_s, state, config, drop)
    if wait_s > 0:
        return f"cooling down for another {wait_s:.0f} s"
    spent_s = math.fsum(charge.device_s for charge in state.charges)
    seconds = _seconds(arm, state, config, COMPARISONS, config.probe_fraction)
    needed_s = seconds.train.mean + seconds.probe.mean + seconds.score.mean
    if spent_s + needed_s > config.budget_device_s_per_hour:
        return f"needs {needed_s:.0f} device-s, {spent_s:.0f} of {config.budget_device_s_per_hour:.0f} spent this hour"
    return ""


def _cooldown_left_s(now_s: float, state: PolicyState, config: PolicyConfig, drop: float) -> float:
    """Seconds until the next update may start; a drop that has grown ends the back-off, not the plain cool-down."""
    if state.ended_s == 0.0:
        return 0.0
    grown = drop > config.evidence_growth * state.abandoned_drop
    # Beyond 64 doublings the cap has long been reached, and a float power would overflow.
    rounds = 0 if grown else min(state.abandoned_in_row, 64)
    longest_s = max(config.backoff_max_s, state.cooldown_s)
    return state.ended_s + min(state.cooldown_s * config.backoff_factor**rounds, longest_s) - now_s


def _why(best: NetEstimate) -> str:
    pays = "never" if best.break_even_s is None else f"after {best.break_even_s:.0f} s"
    return (
        f"{best.arm} is expected to save {best.gain_mean:.1%} of serving time: {best.benefit_s:.1f} device-s over the "
        f"horizon for {best.cost_s:.1f}, net at least {best.net_lower_s:.1f}, paid back {pays}"
    )


def _why_not(estimates: tuple[NetEstimate, ...], best: NetEstimate | None) -> str:
    if not estimates:
        return "no arm trains"
    if best is None:
        return "; ".join(f"{estimate.arm}: {estimate.blocked}" for estimate in estimates)
    return (
        f"the best arm, {best.arm}, is expected to save {best.benefit_s:.1f} device-s over the horizon and to cost "
        f"{best.cost_s:.1f}; its net value may be as low as {best.net_lower_s:.1f}"
    )


def _after_probe(
    context: DecisionContext, measured: MeasuredGain, state: PolicyState, config: PolicyConfig
) -> Decision:
    """Continue or abandon, from the gain measured after the micro-profile; what the probe cost is sunk."""
    arm = config.arm(context.measured_arm)
    prior = predict_gain(arm, state, context, context.traffic_share, context.mean_drop)
    gain = combine(prior, measured.mean, arm.probe_gain_share, measured.se)
    estimate = net_estimate(
        arm.name,
        gain,
        context.busy_fraction,
        _seconds(arm, state, config, COMPARISONS - 1, 0.0),
        _horizon(context, config),
        config.cost,
        config.confidence,
    )
    verdict, _ = attribute(context, state, config)
    found = (
        f"the micro-profile saves {measured.mean:+.1%} (standard error {measured.se:.1%}) on "
        f"{measured.conversations} held-out conversations"
    )
    go = estimate.net_lower_s > 0 and verdict != FAULT
    return Decision(
        action=CONTINUE if go else ABANDON,
        arm=arm.name,
        verdict=verdict,
        reason=f"{found}; {_why(estimate) if go else _why_not((estimate,), estimate)}",
        estimates=(estimate,),
        traffic_share=context.traffic_share,
        mean_drop=context.mean_drop,
    )

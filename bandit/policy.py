"""The decision rule: ``(context, state, config) -> (decision, state)``. Pure; everything read is a logged input.

Two stages. At rest: is an update by an arm surely worth it, trial and all? One lower confidence bound on the net value
is compared with 0. After the micro-profile, with the gain *measured* on held-out conversations: is the rest still
expected to be worth it?
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

from specblock.bandit.attribution import attribute, parity_of
from specblock.bandit.backoff import cooldown_left_s
from specblock.bandit.codec import digest, dumps
from specblock.bandit.config import Arm, PolicyConfig
from specblock.bandit.curiosity import curiosity_s
from specblock.bandit.decision import (
    ABANDON,
    CHECK,
    CONTINUE,
    FAULT,
    HOUR_S,
    PROBE,
    SKIP,
    Decision,
    DecisionContext,
    Option,
    PolicyState,
    Probed,
    Target,
)
from specblock.bandit.exploring import draw, explore_probability, near_margin
from specblock.bandit.forecast import complete_value, faded, remaining_value, score_s
from specblock.bandit.reach import targets, training_focus

MIN_PROBED = 2
"""Held-out conversations without which a micro-profile has measured nothing."""


def decide(context: DecisionContext, state: PolicyState, config: PolicyConfig) -> tuple[Decision, PolicyState]:
    """Take one decision.

    Args:
        context: what is measured now.
        state: what was learned.
        config: the operator's numbers.

    Returns:
        The decision, and the state without expired charges; a decision at rest is counted (its number is its id).
    """
    recent = tuple(charge for charge in state.charges if charge.time_s > context.now_s - HOUR_S)
    state = replace(state, charges=recent)
    known = faded(state, context.now_s, config)
    if context.probed is not None:
        return _after_probe(context, context.probed, known, config), state
    return _at_rest(context, known, config), replace(state, decisions=state.decisions + 1)


def inputs_digest(context: DecisionContext, state: PolicyState, config: PolicyConfig) -> str:
    """SHA-256 of everything a decision depends on."""
    return digest([dumps(context), dumps(state), _configuration(config)])


@functools.lru_cache(maxsize=8)
def _configuration(config: PolicyConfig) -> str:
    return dumps(config)


def _at_rest(context: DecisionContext, state: PolicyState, config: PolicyConfig) -> Decision:
    verdict, evidence = attribute(context, state, config)
    reached = targets(context, config)
    # What an earlier version would give back is known before what training is worth beside it.
    instead, found = "", {}
    for arm in sorted((arm for arm in config.arms if arm.acts), key=lambda arm: not arm.restores):
        option = _option(arm, reached, context, state, config, instead)
        if option is not None:
            found[arm.name] = option
            surely = arm.restores and not option.blocked and option.value.net_lower > 0
            instead = option.version if surely else instead
    options = tuple(found[arm.name] for arm in config.arms if arm.name in found)
    free = [option for option in options if not option.blocked]
    best = max(free, key=lambda o: o.value.net_lower, default=None)
    chosen = best if best is not None and best.value.net_lower > 0 else None
    chosen = chosen or max((o for o in free if o.curiosity > 0), key=lambda o: o.curiosity, default=None)
    plain = Decision(action=SKIP, verdict=verdict, reason=evidence, options=options, targets=reached)
    usual = _act(chosen, best, plain, context, state, config)
    narrow = max((o for o in free if near_margin(o.value)), key=lambda o: o.value.net, default=None)
    if chosen is not None or narrow is None:
        return usual
    explored = _act(narrow, best, plain, context, state, config)
    chance = explore_probability(context.since_s, config.explore)
    if explored.action == usual.action:
        return usual
    if draw(context.now_s, config.explore) < chance:
        # A parity check is a decision of its own at the same time. The one after it draws the same number, and only
        # that one has the chance on record: both together are one draw.
        return explored if explored.action == CHECK else replace(explored, probability=chance)
    return replace(usual, probability=1 - chance)


def _act(
    chosen: Option | None,
    best: Option | None,
    plain: Decision,
    context: DecisionContext,
    state: PolicyState,
    config: PolicyConfig,
) -> Decision:
    """What is done about an arm that shall be tried (None: none), unless something comes first."""
    evidence = plain.reason
    if check := _check_wanted(context, state, config, chosen is not None):
        return replace(plain, action=CHECK, reason=check)
    if plain.verdict == FAULT:
        return plain
    if context.num_changes > state.changes_attributed:
        return replace(
            plain, reason=f"{evidence}; acceptance changed, the parity check on it is not due or has no data"
        )
    if chosen is None:
        return replace(plain, reason=f"{evidence}; {_why_not(plain.options, best)}")
    parity = parity_of(context, state)
    if parity is None or parity.verdict != "ok":
        return replace(plain, reason=f"{evidence}; an update would pay, but parity has too few conversations to judge")
    return replace(plain, action=PROBE, arm=chosen.value.arm, reason=f"{evidence}; {_why(chosen)}")


def _check_wanted(context: DecisionContext, state: PolicyState, config: PolicyConfig, wanted: bool) -> str:
    """Why a parity check is due now; empty if none is."""
    rules, record, parity = config.parity, state.parity, parity_of(context, state)
    if not any(d.measurable for d in context.domains):
        return ""
    age_s = math.inf if record is None or parity is None else context.now_s - record.time_s
    # A fault stays until somebody mends it: looking again and again would cost more than it tells.
    doublings = min(max(0, record.broken_in_row - 1), 64) if record is not None and parity is not None else 0
    dear_s = score_s(state, config).mean / (rules.max_share * max(context.busy_devices, 0.01))
    regular_s = max(rules.every_s, dear_s)
    if age_s < min(rules.retry_s * 2.0**doublings, max(rules.retry_s, regular_s)):
        return ""
    if parity is not None and parity.verdict == "broken":
        return "parity was broken; looking again"
    if context.num_changes > state.changes_attributed:
        return "acceptance changed; first find out whether something is broken"
    if wanted and (age_s > rules.valid_s or (parity is not None and parity.verdict != "ok")):
        return "an update would pay; first make sure that nothing is broken"
    return "regular check of live acceptance against exact replay" if age_s > regular_s else ""


def _option(
    arm: Arm,
    reached: tuple[Target, ...],
    context: DecisionContext,
    state: PolicyState,
    config: PolicyConfig,
    instead: str,
) -> Option | None:
    """The arm's option, for the best version if it restores one; None: there is none that it could restore."""
    versions = context.stored if arm.restores else ("",)
    values = {version: complete_value(arm, context, state, config, version, instead) for version in versions}
    version = max(values, key=lambda name: values[name].net_lower, default=None)
    if version is None:
        return None
    curiosity = 0.0
    if arm.restores and context.base and values[version].net_lower <= 0:
        curiosity = curiosity_s(values[context.base], context, state, config)
        version = context.base if curiosity > 0 else version
    value = values[version]
    # In the currency of the charges: interference and stall are booked against the budget, so they are needed too.
    blocked = _blocked(arm, value.cost, reached, context, state, config)
    return Option(value=value, blocked=blocked, version=version, curiosity=curiosity)


def _blocked(
    arm: Arm,
    needed_s: float,
    reached: tuple[Target, ...],
    context: DecisionContext,
    state: PolicyState,
    config: PolicyConfig,
) -> str:
    if not reached:
        return "no domain has both enough recent traffic and training conversations"
    # Counted where the training would go: conversations of other kinds of text say little about the one that fell.
    num_train = _effective(reached, {d.domain: d.num_train for d in context.domains}, config.min_train_windows, config)
    num_heldout = _effective(
        reached, {d.domain: d.num_heldout for d in context.domains}, config.min_heldout_windows, config
    )
    if num_train < config.min_train_windows and not arm.restores:
        return f"{num_train:.0f} of {config.min_train_windows} training conversations of what it would be made for"
    if num_heldout < config.min_heldout_windows:
        return f"{num_heldout:.0f} of {config.min_heldout_windows} held-out conversations of what it would be made for"
    wait_s = cooldown_left_s(arm, context.now_s, state, config, reached, context.busy_devices)
    if wait_s > 0:
        return f"cooling down for another {wait_s:.0f} s"
    spent_s, budget_s = math.fsum(c.device_s for c in state.charges), config.budget_device_s_per_hour
    if spent_s + needed_s > budget_s:
        return f"needs {needed_s:.1f} device-s, {spent_s:.1f} of {budget_s:.0f} are spent this hour"
    return ""


def _effective(reached: tuple[Target, ...], counts: dict[str, int], enough: int, config: PolicyConfig) -> float:
    """Conversations per domain, averaged with the weights that training would give the domains.

    More than ``enough`` in one domain makes up for missing ones in another only a little: by a third.
    """
    weights = {name: one.weight for name, one in training_focus(reached, config.min_drop).items()}
    total, most = math.fsum(weights.values()), enough * 4 / 3
    return (
        math.fsum(w * min(counts.get(domain, 0), most) for domain, w in weights.items()) / total if total > 0 else 0.0
    )


def _after_probe(context: DecisionContext, probed: Probed, state: PolicyState, config: PolicyConfig) -> Decision:
    """Continue or abandon, from the gain measured after the micro-profile."""
    value = remaining_value(config.arm(probed.arm), probed, context, state, config)
    option = Option(value=value, version=probed.version)
    verdict, evidence = attribute(context, state, config)
    found = (
        f"{probed.version or 'the micro-profile'} saves {probed.saving.relative:+.1%} on "
        f"{probed.saving.conversations} held-out conversations"
    )
    measured = probed.saving.conversations >= MIN_PROBED
    # The bound was asked when it was decided. A trial is short and tells little: asked again, it would end many an
    # update that pays by chance alone, with the trial paid and a back-off begun.
    go = measured and value.net > 0 and verdict != FAULT
    why = _why(option, tried=True) if go else _why_not((option,), option)
    if verdict == FAULT or not measured:
        why = evidence if verdict == FAULT else "too few to judge a candidate by"
    return Decision(
        action=CONTINUE if go else ABANDON,
        arm=probed.arm,
        verdict=verdict,
        reason=f"{found}; {why}",
        options=(option,),
        targets=probed.targets,
    )


def may_pay(decision: Decision) -> bool:
    """Whether an update that is given up after its trial might have paid all the same.

    The trial is short: mostly it leaves the net value's *upper* bound above 0, and then nothing is shown against the
    arm. A fault is a reason to keep away from training, whatever the trial measured.
    """
    option = decision.option()
    return option is not None and decision.verdict != FAULT and 2 * option.value.net - option.value.net_lower > 0


def _why(best: Option, *, tried: bool = False) -> str:
    value = best.value
    if best.curiosity > 0:
        return (
            f"nothing is known of {best.version} on most of the text of now: comparing it is expected to be worth "
            f"{best.curiosity:.1f} device-s more than it costs"
        )
    pays = "never" if value.break_even_s is None else f"after {value.break_even_s:.0f} s"
    surely = f"net at least {value.net_lower:.1f}"
    if near_margin(value):
        doubt = "the gate will tell" if tried else "a trial will tell"
        surely = f"net {value.net:.1f}, but perhaps as little as {value.net_lower:.1f}: {doubt}"
    return (
        f"{best.named} is expected to save {value.gain:.1%} of serving time: {value.benefit:.1f} device-s over the "
        f"horizon for {value.cost:.1f}, {surely}, paid back {pays}"
    )


def _why_not(options: tuple[Option, ...], best: Option | None) -> str:
    if best is None:
        return (
            "; ".join(f"{option.value.arm}: {option.blocked}" for option in options)
            or "no arm can do anything: none trains, or there is no earlier version to restore"
        )
    value = best.value
    return (
        f"the best arm, {best.named}, is expected to save {value.benefit:.1f} device-s over the horizon and to cost "
        f"{value.cost:.1f}; its net value may be as low as {value.net_lower:.1f}"
    )

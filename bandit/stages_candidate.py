"""Stages in which a candidate does not serve yet: trial, training, gate. True: something was recorded."""

from __future__ import annotations

import math
from dataclasses import replace

from specblock.bandit.actions import Focus, Mix, WindowSummary
from specblock.bandit.context import build_context, expected_s, trial_since_s
from specblock.bandit.cost import charge_s
from specblock.bandit.decision import CONTINUE, Probed
from specblock.bandit.evidence import gate_numbers, saving_numbers
from specblock.bandit.forecast import gate_outlook
from specblock.bandit.gate import GateEvidence, gate_rows, judge, pooled_saving
from specblock.bandit.learning import learn_training
from specblock.bandit.outside import attempt
from specblock.bandit.policy import decide, inputs_digest, may_pay
from specblock.bandit.reach import meant_for, targets, told_drop, training_focus
from specblock.bandit.stage_tools import StageTools
from specblock.bandit.state import PendingUpdate

LOOK_AROUND_S = 60.0
"""Between two looks, while a candidate waits for its text, whether other text needs an update."""


def probe(tools: StageTools, pending: PendingUpdate, now_s: float) -> bool:
    """Run the micro-profile (or take the version to restore), measure it on held-out conversations, decide again."""
    config, key, arm = tools.config, pending.decision_id, tools.config.arm(pending.arm)
    stored = attempt(tools.actions.versions) if arm.restores else ()
    candidate, trained_s = pending.candidate_version, 0.0
    if not arm.restores:
        candidate, trained_s = _micro_profile(tools, pending, now_s)
    tools.begin(pending, "scoring", now_s, candidate_version=candidate, charged_s=trained_s)
    since_s = trial_since_s(tools.state, attempt(tools.actions.windows), pending, now_s, config)
    report, cost_s = tools.compare(pending.base_version, candidate, since_s)
    away = {target.domain for target in pending.targets if not target.there} if arm.restores else set()
    saving = pooled_saving([row for row in gate_rows(report) if row.domain not in away])
    probed = Probed(arm=arm.name, version=pending.option.version, targets=pending.targets, saving=saving)
    context = build_context(tools.state, WindowSummary(), pending.base_version, now_s, config, stored=stored)
    context, known = replace(context, probed=probed), tools.state.policy
    decision, tools.state.policy = decide(context, known, config)
    record = tools.journal.write(
        key,
        "probed",
        now_s,
        decision.reason,
        charged_s=cost_s,
        options=decision.options,
        numbers=saving_numbers(saving),
        inputs_sha256=inputs_digest(context, known, config),
        context=context,
        policy_state=known,
    )
    if decision.action != CONTINUE:
        tools.learn_trial(pending, saving, now_s)
        tools.drop(record, "abandoned", now_s, decision.reason, decided=not may_pay(decision))
        return True
    option = decision.option() or pending.option
    if not arm.restores:
        tools.move(stage="training", candidate_version=candidate, option=option, trial=saving)
        return True
    # Nothing was trained, but it was chosen for what the serving version accepts lately: the gate sees what comes now.
    tools.move(
        stage="gating",
        option=option,
        cutoff_s=now_s,
        deadline_s=now_s + config.gate.deadline_s,
        requests_mark=tools.state.requests,
        next_look=config.gate.first_look_requests,
    )
    return True


def _micro_profile(tools: StageTools, pending: PendingUpdate, now_s: float) -> tuple[str, float]:
    """Train the arm's first steps; the candidate, and what is charged for it."""
    config, arm, share = tools.config, tools.config.arm(pending.arm), tools.config.probe_fraction
    tools.begin(pending, "probing", now_s, train=share)
    focus = _focus(tools, pending, now_s)
    key, base = pending.decision_id, pending.base_version
    trained = attempt(lambda: tools.actions.train(key, arm, base, share, False, focus))
    tools.state.policy = learn_training(tools.state.policy, arm, share, trained)
    return trained.candidate_version, charge_s(config.cost, device_s=trained.device_s, train_s=trained.train_s)


def _focus(tools: StageTools, pending: PendingUpdate, now_s: float) -> dict[str, Focus]:
    """What the update trains on."""
    return training_focus(pending.targets, tools.config.min_drop, expected_s(tools.state, now_s, tools.config))


def train(tools: StageTools, pending: PendingUpdate, now_s: float) -> bool:
    """Run the rest of the arm's steps."""
    config, arm = tools.config, tools.config.arm(pending.arm)
    rest = 1 - config.probe_fraction
    tools.begin(pending, "training", now_s, train=rest)
    key, focus = pending.decision_id, _focus(tools, pending, now_s)
    report = attempt(lambda: tools.actions.train(key, arm, pending.base_version, 1.0, True, focus))
    tools.state.policy = learn_training(tools.state.policy, arm, rest, report)
    tools.journal.write(
        pending.decision_id,
        "trained",
        now_s,
        f"{report.positions} positions in {report.train_s:.1f} s",
        candidate_version=report.candidate_version,
        charged_s=charge_s(config.cost, device_s=report.device_s, train_s=report.train_s),
        numbers={"train_s": report.train_s, "positions": float(report.positions)},
    )
    meant = meant_for(pending.targets, config.min_drop)
    tools.move(
        stage="gating",
        meant=meant,
        candidate_version=report.candidate_version,
        cutoff_s=report.cutoff_time_s,
        deadline_s=now_s + report.train_s + config.gate.deadline_s,
        requests_mark=tools.finished(meant),
        next_look=config.gate.first_look_requests,
    )
    return True


def gate(tools: StageTools, pending: PendingUpdate, now_s: float) -> bool:
    """Take the next look once enough requests finished, the last at the deadline; pass, reject or wait on."""
    rules, late = tools.config.gate, now_s >= pending.deadline_s
    requests = tools.finished(pending.meant) - pending.requests_mark
    # Requests that were served without drafts are not counted, but their conversations are there to be looked at.
    waiting = requests < pending.next_look and not late
    needed = _needed_elsewhere(tools, pending, now_s) if waiting else ""
    if waiting and not needed:
        return False
    look = pending.looks + 1
    tools.begin(pending, f"gating-{look}", now_s)
    # What an earlier look has seen need not be replayed again: a look costs what is new in it.
    since_s = max((row.time_s for row in pending.rows), default=pending.cutoff_s)
    report, cost_s = tools.compare(
        pending.base_version, pending.candidate_version, since_s, _mix(tools, pending, now_s)
    )
    seen = {row.conversation_id for row in pending.rows}
    fresh = [r for r in gate_rows(report) if r.time_s > pending.cutoff_s and r.conversation_id not in seen]
    rows = (*pending.rows, *fresh)
    evidence = judge(rows, pending.scale_s, rules)
    numbers = gate_numbers(evidence)
    tools.journal.write(pending.decision_id, f"gated-{look}", now_s, evidence.reason, charged_s=cost_s, numbers=numbers)
    next_look = math.ceil(requests * rules.look_growth)
    tools.move(stage="gating", looks=look, rows=rows, next_look=next_look)
    if evidence.verdict == "pass":
        tools.move(stage="promoting")
    elif evidence.verdict == "fail":
        tools.reject(pending, now_s, evidence.reason, decided=True)
    elif late or needed:
        why = needed or "undecided at the deadline"
        tools.reject(pending, now_s, f"{why}: {evidence.reason}", decided=False)
    elif outlook := _not_worth_looking_on(tools, pending, evidence):
        tools.reject(pending, now_s, outlook, decided=False)
    return True


def _mix(tools: StageTools, pending: PendingUpdate, now_s: float) -> Mix | None:
    """What a trained candidate is judged on: text that it is made for may have gone, and comes back.

    Other text counts as much as is expected of it within the horizon, by what is known now. What is restored is meant
    for the text of now, whatever that is (None).
    """
    if not pending.meant:
        return None
    expected = expected_s(tools.state, now_s, tools.config)
    meant_s = math.fsum(expected.get(name, 0.0) for name in pending.meant)
    if meant_s <= 0:
        return None
    mix = Mix(meant=pending.meant, others=(math.fsum(expected.values()) - meant_s) / meant_s)
    return mix.after([row.domain for row in pending.rows])


def _needed_elsewhere(tools: StageTools, pending: PendingUpdate, now_s: float) -> str:
    """Why waiting for text that has gone must end; empty if it has not gone, or nothing else needs an update."""
    presence = tools.state.presence
    gone = pending.meant and not any(presence[name].there for name in pending.meant if name in presence)
    if not gone or now_s - pending.around_s < LOOK_AROUND_S:
        return ""
    tools.move(around_s=now_s)
    context = build_context(tools.state, attempt(tools.actions.windows), pending.base_version, now_s, tools.config)
    fallen = [
        target.domain
        for target in targets(context, tools.config)
        if target.domain not in pending.meant and target.there and told_drop(target, tools.config) > 0
    ]
    return f"the text it was made for has gone and {', '.join(fallen)} fell" if fallen else ""


def _not_worth_looking_on(tools: StageTools, pending: PendingUpdate, evidence: GateEvidence) -> str:
    """Why further looks would cost more than the candidate may still bring; empty if they would not.

    The gate's error does not depend on it: a candidate that is given up does not pass.
    """
    saving = evidence.saving
    if saving.conversations < tools.config.gate.min_conversations:
        return ""
    benefit_s, cost_s = gate_outlook(pending.option.value, saving, tools.state.policy, tools.config)
    if benefit_s > cost_s:
        return ""
    return (
        f"{evidence.reason}; given up: it may still bring {benefit_s:.1f} device-s, looking on would cost {cost_s:.1f}"
    )

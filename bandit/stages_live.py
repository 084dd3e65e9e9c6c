"""Stages from the promotion on: swap, parity of the live version, realised gain. True: something was recorded."""

from __future__ import annotations

from dataclasses import replace

from specblock.bandit.accrual import close_accrual
from specblock.bandit.actions import PairedReplay, ParityRow
from specblock.bandit.cost import charge_s
from specblock.bandit.evidence import parity_numbers, parity_words, saving_numbers
from specblock.bandit.gate import gate_rows, pooled_saving
from specblock.bandit.intervals import one_sided_z
from specblock.bandit.learning import learn_stall
from specblock.bandit.outside import attempt
from specblock.bandit.parity import judge as judge_parity
from specblock.bandit.recovery import BROKEN
from specblock.bandit.stage_tools import StageTools
from specblock.bandit.state import Accrual, PendingUpdate

ROLLBACK_CONFIDENCE = 0.95
"""One-sided confidence that a live version loses before it is taken back."""


def promote(tools: StageTools, pending: PendingUpdate, now_s: float) -> bool:
    """Make the candidate serve."""
    config, key = tools.config, pending.decision_id
    expected_s = charge_s(config.cost, stall_s=pending.option.value.stall_s)
    tools.journal.write(key, "promoting", now_s, expected_s=expected_s)
    serve = tools.actions.restore if config.arm(pending.arm).restores else tools.actions.promote
    swap = attempt(lambda: serve(key, pending.candidate_version))
    tools.state.policy = learn_stall(tools.state.policy, swap.stall_s)
    cost_s = charge_s(config.cost, stall_s=swap.stall_s)
    if not swap.ok:
        record = tools.ledger.open_record(key)
        assert record is not None
        tools.recovery.bar(record, now_s)
        tools.drop(record, "abandoned", now_s, f"the promotion was refused: {swap.detail}", charged_s=cost_s)
        return True
    tools.journal.write(
        key,
        "promoted",
        now_s,
        swap.detail,
        candidate_version=swap.version,
        charged_s=cost_s,
        options=(pending.option,),
    )
    close_accrual(tools.state, tools.ledger, swap.version, now_s)
    tools.state.serves_again(swap.version)
    served = tools.state.totals(swap.version)
    tools.move(
        stage="verifying",
        new_version=swap.version,
        promoted_s=now_s,
        requests_mark=served.requests,
        tokens_mark=served.tokens,
        deadline_s=now_s + config.gate.settle_deadline_s,
    )
    return True


def verify(tools: StageTools, pending: PendingUpdate, now_s: float) -> bool:
    """Once enough requests were served, compare live acceptance with replay; broken: take the candidate back."""
    if not tools.served(pending, tools.config.gate.verify_requests, now_s):
        return False
    tools.begin(pending, "verifying", now_s)
    evidence, cost_s = tools.parity(pending.new_version, now_s, pending.promoted_s)
    words, numbers = parity_words(evidence), parity_numbers(evidence)
    record = tools.journal.write(pending.decision_id, "verified", now_s, words, charged_s=cost_s, numbers=numbers)
    tools.move(stage="settling")
    if evidence.verdict == "broken":
        tools.recovery.roll_back(record, now_s, words, {BROKEN: 1.0})
    return True


def settle(tools: StageTools, pending: PendingUpdate, now_s: float) -> bool:
    """Measure the realised gain on what was served live; a loss: take the candidate back."""
    if not tools.served(pending, tools.config.gate.settle_requests, now_s):
        return False
    tools.begin(pending, "settling", now_s)
    report, cost_s = tools.compare(pending.base_version, pending.new_version, pending.promoted_s)
    live = [row for row in report.rows if row.live_version == pending.new_version and row.live_cycles > 0]
    rows = gate_rows(replace(report, rows=tuple(_as_served(row) for row in live)))
    saving = pooled_saving(rows)
    record = tools.ledger.open_record(pending.decision_id)
    assert record is not None
    if saving.conversations < 2:
        reason = "too few live conversations to measure its realised gain"
        tools.recovery.finish(record, "settled", now_s, reason, charged_s=cost_s)
        return True
    tokens = tools.state.totals(pending.new_version).tokens
    realised_s = saving.s_per_token * (tokens - pending.tokens_mark)
    numbers = {**saving_numbers(saving), "realised_s": realised_s, "predicted_gain": pending.option.value.gain}
    broken = _live_parity(tools, live)
    if not broken:  # a fault says nothing about the version
        # What the gate saw are other conversations, often more of them, and as good a measurement.
        tools.learn(pending, pooled_saving((*pending.rows, *rows)), now_s)
    if broken or saving.relative + one_sided_z(ROLLBACK_CONFIDENCE) * saving.se < 0:
        loss = broken or f"live it costs {-saving.relative:.1%} more per token than the version before"
        numbers |= {BROKEN: 1.0} if broken else {}
        if not broken:  # more telling than what the gate saw
            tools.remember(pending.new_version, pending.base_version, saving, now_s)
        tools.recovery.roll_back(replace(record, expected_s=cost_s), now_s, loss, numbers)
        return True
    reason = (
        f"it saved {saving.relative:+.1%} (standard error {saving.se:.1%}) on {saving.conversations} conversations "
        f"served live, {realised_s:+.1f} device-seconds so far; predicted were {pending.option.value.gain:+.1%}"
    )
    tools.recovery.finish(record, "settled", now_s, reason, charged_s=cost_s, numbers=numbers)
    tools.state.accrual = Accrual(
        decision_id=pending.decision_id,
        version=pending.new_version,
        saving_s_per_token=saving.s_per_token,
        tokens_mark=tokens,
    )
    return True


def _live_parity(tools: StageTools, live: list[PairedReplay]) -> str:
    """What is wrong with the live version's acceptance, in words; empty if it is what replay gives."""
    parity = judge_parity(
        [
            ParityRow(
                conversation_id=row.conversation_id,
                tokens=row.tokens,
                live_cycles=row.live_cycles,
                replay_cycles=row.cycles_new,
            )
            for row in live
        ],
        tools.config.parity,
    )
    return parity_words(parity) if parity.verdict == "broken" else ""


def _as_served(row: PairedReplay) -> PairedReplay:
    """The row with the cycles that were really needed live in place of the replayed ones."""
    return replace(row, cycles_new=row.live_cycles)

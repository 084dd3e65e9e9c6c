"""Taking recorded decisions again: under the same rule they come out the same, under another one it is a what-if."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from specblock.bandit.config import PolicyConfig
from specblock.bandit.decision import PROBE, Decision, PolicyState
from specblock.bandit.ledger import DECIDED, LedgerRecord
from specblock.bandit.policy import decide, inputs_digest

PROBED = "probed"
"""Stage at which the rule decides a second time, with the micro-profile's gain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """Whether a recorded decision came out the same, bit for bit; ``why`` says what did not."""

    decision_id: str
    stage: str
    time_s: float
    reproduced: bool
    why: str = ""


def recorded_inputs(records: Iterable[LedgerRecord]) -> Iterator[tuple[LedgerRecord, PolicyState | None]]:
    """Every recorded decision and what the rule knew when it took it; None where the ledger does not say.

    Args:
        records: oldest first, from the ledger's beginning.
    """
    at_rest: PolicyState | None = None
    for record in records:
        if record.stage == DECIDED:
            # Written only when it differs from that of the decision before, the decision's number apart.
            at_rest = record.policy_state or at_rest
            known = replace(at_rest, decisions=int(record.decision_id[1:])) if at_rest else None
            yield record, known if record.context else None
        elif record.stage == PROBED:
            yield record, record.policy_state if record.context else None


def replay_decisions(records: Iterable[LedgerRecord], config: PolicyConfig) -> Iterator[tuple[LedgerRecord, Decision]]:
    """Every recorded decision whose inputs are in the ledger, and what ``config`` decides on the same inputs.

    Args:
        records: oldest first, from the ledger's beginning.
        config: the rule; an arm that a recorded micro-profile used must be in it.
    """
    for record, state in recorded_inputs(records):
        if record.context is not None and state is not None:
            decision, _ = decide(record.context, state, config)
            yield record, decision


def reproductions(records: Iterable[LedgerRecord], config: PolicyConfig) -> Iterator[Reproduction]:
    """Takes every recorded decision again with ``config``, the rule it is believed to have been taken with."""
    for record, state in recorded_inputs(records):
        why = _why_not(record, state, config)
        yield Reproduction(
            decision_id=record.decision_id,
            stage=record.stage,
            time_s=record.time_s,
            reproduced=not why,
            why=why,
        )


def _why_not(record: LedgerRecord, state: PolicyState | None, config: PolicyConfig) -> str:
    """What is not as recorded; empty if everything is."""
    context = record.context
    if context is None or state is None:
        return "its inputs are not in the ledger"
    other_numbers = inputs_digest(context, state, config) != record.inputs_sha256
    try:
        decision, _ = decide(context, state, config)
    except ValueError as error:
        return str(error)
    taken = {
        "verdict": (record.verdict, decision.verdict),
        "action": (record.action, decision.action),
        "arm": (record.arm, decision.arm),
        "reason": (record.reason, decision.reason),
        "predicted values": (record.options, decision.options),
        "probability": (record.probability, decision.probability),
    }
    # After a micro-profile the record still names the decision it belongs to; reason and values are the new one's.
    compared = (
        taken if record.stage == DECIDED else {name: taken[name] for name in ("arm", "reason", "predicted values")}
    )
    changed = [name for name, (before, now) in compared.items() if before != now]
    if other_numbers:
        effect = f"{', '.join(changed)} would differ" if changed else "though it would come out the same"
        return f"it was taken under other numbers or its inputs were changed (their fingerprint differs), {effect}"
    return f"{', '.join(changed)} came out differently" if changed else ""


def recorded_action(record: LedgerRecord, continued: bool) -> str:
    """What the record decided, in a word or two; ``continued``: training went on after the micro-profile."""
    if record.stage == PROBED:
        return f"{'continue' if continued else 'abandon'} {record.arm}"
    return f"{record.action} {record.arm}".strip() if record.action == PROBE else record.action


def decided_action(decision: Decision) -> str:
    """The same of a decision that was taken again."""
    return f"{decision.action} {decision.arm}".strip()

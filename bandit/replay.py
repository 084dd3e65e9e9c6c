"""Taking recorded decisions again: under the same rule they come out the same, under another one it is a what-if."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from specblock.bandit.config import PolicyConfig
from specblock.bandit.decision import Decision, PolicyState
from specblock.bandit.ledger import DECIDED, LedgerRecord
from specblock.bandit.policy import decide


def replay_decisions(records: Iterable[LedgerRecord], config: PolicyConfig) -> Iterator[tuple[LedgerRecord, Decision]]:
    """Every recorded decision whose inputs are in the ledger, and what ``config`` decides on the same inputs.

    Args:
        records: oldest first, from the ledger's beginning.
        config: the rule; an arm that a recorded micro-profile used must be in it.
    """
    at_rest: PolicyState | None = None
    for record in records:
        state = record.policy_state
        if record.stage == DECIDED:
            # Written only when it differs from that of the decision before.
            state = at_rest = state or at_rest
        if record.context is not None and state is not None:
            decision, _ = decide(record.context, replace(state, decisions=0), config)
            yield record, decision

"""Calls to the outside world: what was measured is charged and learned, what failed is told apart from our own bugs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from specblock.bandit.actions import Actions
from specblock.bandit.config import PolicyConfig
from specblock.bandit.errors import BanditError
from specblock.bandit.learning import charge
from specblock.bandit.ledger import Ledger, LedgerRecord
from specblock.bandit.state import BanditState

T = TypeVar("T")

BLANK: Mapping[str, object] = {
    "expected_s": 0.0,
    "charged_s": 0.0,
    "options": (),
    "numbers": {},
    "inputs_sha256": "",
    "context": None,
    "policy_state": None,
}
"""What belongs to one stage only."""


class ActionError(BanditError):
    """The outside world raised."""


def attempt(call: Callable[[], T]) -> T:
    """Run one outside action.

    Raises:
        ActionError: it raised; the message names the cause.
    """
    try:
        return call()
    except Exception as error:
        raise ActionError(f"{type(error).__name__}: {error}") from error


class Journal:
    """Writes an update's stages to the ledger and books their charges.

    Args:
        state: charges and the pending update's newest stage are kept there.
        ledger: destination.
        actions: for discarding candidates.
        config: prices.
    """

    def __init__(self, state: BanditState, ledger: Ledger, actions: Actions, config: PolicyConfig) -> None:
        self.state, self.ledger, self.actions, self.config = state, ledger, actions, config

    def write(self, decision_id: str, stage: str, now_s: float, reason: str = "", **changes: object) -> LedgerRecord:
        """Append the next stage of an open decision; fields not in ``changes`` are carried over or reset.

        Raises:
            LedgerError: that stage is recorded already.
        """
        before = self.ledger.open_record(decision_id)
        assert before is not None, f"{decision_id} is not open"
        fresh: Mapping[str, object] = {**BLANK, **changes}
        record: LedgerRecord = replace(before, stage=stage, time_s=now_s, reason=reason, **fresh)  # type: ignore[arg-type]
        self.ledger.append(record)
        self.state.policy = charge(self.state.policy, now_s, record.charged_s)
        pending = self.state.pending
        if pending is not None and pending.decision_id == decision_id:
            self.state.pending = replace(pending, ledger_stage=stage)
        return record

    def discard(self, candidate_version: str) -> str:
        """Forget a candidate; returns what went wrong, in words, or nothing."""
        if not candidate_version:
            return ""
        try:
            attempt(lambda: self.actions.discard(candidate_version))
        except ActionError as error:
            return f" (the candidate could not be discarded: {error})"
        return ""

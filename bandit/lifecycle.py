"""One update from the decision to its realised gain: a state machine that moves at most one stage per step.

    probing -> training -> gating ... gating -> promoting -> verifying -> settling -> settled
       |                     |                    |            |             |
    abandoned             rejected            abandoned    rolled_back   rolled_back

An earlier version that is restored is compared when probing, and goes to the gate without training.

Every outside action is recorded before it starts. Waiting (for conversations at the gate, for live requests after the
promotion) is returning without having done anything.
"""

from __future__ import annotations

from specblock.bandit.actions import Actions
from specblock.bandit.config import PolicyConfig
from specblock.bandit.evidence import parity_numbers, parity_words
from specblock.bandit.ledger import Ledger, LedgerRecord
from specblock.bandit.outside import ActionError, attempt
from specblock.bandit.recovery import BEGUN, LIVE, retry_or_end
from specblock.bandit.stage_tools import StageTools
from specblock.bandit.stages_candidate import gate, probe, train
from specblock.bandit.stages_live import promote, settle, verify
from specblock.bandit.state import BanditState, PendingUpdate

STAGES = {
    "probing": probe,
    "training": train,
    "gating": gate,
    "promoting": promote,
    "verifying": verify,
    "settling": settle,
}


class Lifecycle:
    """Moves the pending update on. Reads and writes ``state``; the caller makes it durable after each step."""

    def __init__(self, state: BanditState, ledger: Ledger, actions: Actions, config: PolicyConfig) -> None:
        self._state, self._ledger, self._actions, self._config = state, ledger, actions, config
        self._tools = StageTools(state, ledger, actions, config)
        self.recovery = self._tools.recovery

    def advance(self, now_s: float) -> tuple[bool, str]:
        """Move on by at most one stage: whether anything was recorded, and what failed, in words."""
        pending = self._state.pending
        assert pending is not None
        record = self._ledger.open_record(pending.decision_id)
        if record is None:
            self._state.pending = None
            return True, f"{pending.decision_id} was pending, but the ledger does not have it open: forgotten"
        if why := self._cannot_go_on(pending, record):
            return True, retry_or_end(self.recovery, record, now_s, why)
        try:
            return self._advance(pending, record, now_s), ""
        except ActionError as error:
            newest = self._ledger.open_record(pending.decision_id)
            if newest is None or newest.stage == record.stage:
                return False, str(error)
            if newest.stage in ("scoring", "promoting"):
                self.recovery.bar(newest, now_s)
            return True, retry_or_end(self.recovery, newest, now_s, f"{newest.stage} failed: {error}") or str(error)

    def _cannot_go_on(self, pending: PendingUpdate, record: LedgerRecord) -> str:
        """Why the update must end before anything more is done; empty if it may go on."""
        if record.stage.partition("-")[0] in BEGUN:
            return f"interrupted after {record.stage!r}; the action is charged and not repeated"
        if pending.arm not in {arm.name for arm in self._config.arms}:
            return f"the arm {pending.arm!r} is no longer configured"
        return ""

    def check_parity(self, decision_id: str, version: str, now_s: float) -> str:
        """Carry out a decision to check parity; returns what failed, in words."""
        try:
            evidence, cost_s = self._tools.parity(version, now_s)
        except ActionError as error:
            record = self._ledger.open_record(decision_id)
            assert record is not None
            return retry_or_end(self.recovery, record, now_s, f"the check failed: {error}") or str(error)
        self._tools.journal.write(
            decision_id, "checked", now_s, parity_words(evidence), charged_s=cost_s, numbers=parity_numbers(evidence)
        )
        return ""

    def _advance(self, pending: PendingUpdate, record: LedgerRecord, now_s: float) -> bool:
        live = record.stage in LIVE
        serving = attempt(self._actions.serving_version)
        if serving != (pending.new_version if live else pending.base_version):
            self.recovery.end(record, now_s, f"superseded: {serving} was made to serve meanwhile")
            return True
        return STAGES[pending.stage](self._tools, pending, now_s)

"""Ending updates that cannot go on: an action failed, was interrupted by a crash, or proved wrong while live.

The ledger decides. If its newest stage of an update is one that this state did not write, the process died between
the two; the action may or may not have happened, so it is charged in full and never repeated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from specblock.bandit.config import Arm
from specblock.bandit.cost import charge_s
from specblock.bandit.decision import PROBE
from specblock.bandit.learning import end_update, learn_barred, learn_stall
from specblock.bandit.ledger import DECIDED, LedgerRecord
from specblock.bandit.outside import ActionError, Journal, attempt
from specblock.bandit.reach import mean_drop

LIVE = frozenset({"promoted", "verifying", "verified", "settling"})
"""Ledger stages at which the candidate serves."""

BEGUN = frozenset({"probing", "scoring", "training", "gating", "promoting", "verifying", "settling", "rolling_back"})
"""Ledger stages (up to a number) that announce an action; found at rest, the action was interrupted."""

UNDOING = frozenset({"promoting", "rolling_back"})
"""Ledger stages at which nobody knows what serves."""

BROKEN, BROKEN_S = "broken", 24 * 3600.0
"""Number in the ledger of a roll-back because live acceptance was not what replay gives, and how long the version is
not restored after it: it may have been the engine."""

UNKNOWN_DROP = 1.0
"""Drop assumed of an update whose targets died with the process: none is larger, so none ends its back-off early."""


class Recovery:
    """Ends updates early. Uses the ledger's newest record only, so it works without a pending update too."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def orphans(self) -> tuple[LedgerRecord, ...]:
        """Open updates and checks that the state does not have at the same stage."""
        pending = self._journal.state.pending
        known = (pending.decision_id, pending.ledger_stage) if pending else None
        return tuple(r for r in self._journal.ledger.open_records() if (r.decision_id, r.stage) != known)

    def end(self, record: LedgerRecord, now_s: float, why: str) -> None:
        """End an update whose newest stage is ``record``; an action it had begun is charged as expected."""
        if record.stage in LIVE:
            self.finish(record, "settled", now_s, f"{why}; its realised gain was not measured")
        elif record.stage in UNDOING and attempt(self._journal.actions.serving_version) != record.base_version:
            self.roll_back(record, now_s, why)
        else:
            # A roll-back that was begun and after which the base serves has happened, whatever it answered.
            stage = "rolled_back" if record.stage == "rolling_back" else "abandoned"
            problem = self._journal.discard(record.candidate_version)
            self.finish(record, stage, now_s, why + problem)

    def roll_back(
        self, record: LedgerRecord, now_s: float, why: str, numbers: Mapping[str, float] | None = None
    ) -> None:
        """Make the base version serve again; ``numbers`` are what the update brought (or cost) while it served.

        Raises:
            ActionError: the outside world raised; the update stays open, so the next step tries again.
        """
        journal = self._journal
        if not journal.ledger.knows(record.decision_id, "rolling_back"):
            record = journal.write(
                record.decision_id,
                "rolling_back",
                now_s,
                why,
                charged_s=record.expected_s,
                numbers=dict(numbers or {}),
            )
        swap = attempt(lambda: journal.actions.rollback(record.decision_id, record.base_version))
        stage, detail = ("rolled_back", "") if swap.ok else ("abandoned", f"; the roll-back was refused: {swap.detail}")
        journal.state.policy = learn_stall(journal.state.policy, swap.stall_s)
        journal.state.serves_again(swap.version)
        cost_s = charge_s(journal.config.cost, stall_s=swap.stall_s)
        problem = journal.discard(record.candidate_version) if swap.ok else ""
        self.finish(record, stage, now_s, why + detail + problem, charged_s=cost_s)

    def finish(
        self,
        record: LedgerRecord,
        stage: str,
        now_s: float,
        reason: str,
        *,
        charged_s: float | None = None,
        numbers: dict[str, float] | None = None,
        decided: bool = True,
    ) -> None:
        """Write the last stage and start the cool-down. ``charged_s`` defaults to what the begun action should cost.

        An update that settles passed the gate, and nothing live spoke against it: it gained. No other did; whether
        it was shown that it would not have paid (``decided``) says how long the next one waits.
        """
        state = self._journal.state
        if stage == "rolled_back" and record.numbers.get(BROKEN):
            state.policy = learn_barred(state.policy, record.candidate_version, now_s, BROKEN_S)
        cost_s = record.expected_s if charged_s is None else charged_s
        self._journal.write(record.decision_id, stage, now_s, reason, charged_s=cost_s, numbers=numbers or {})
        pending = state.pending
        mine = pending is not None and pending.decision_id == record.decision_id
        # A trial by chance keeps a pace of its own: that it found nothing must not put off an update that would pay.
        by_chance = (
            pending.explored and pending.stage == "probing"
            if mine and pending is not None
            else record.stage == DECIDED and record.probability < 1  # lost in a crash before it was remembered
        )
        if record.action == PROBE and not by_chance:
            drop = mean_drop(pending.targets) if mine and pending is not None else UNKNOWN_DROP
            arm = self._arm(record)
            since_s = pending.started_s if mine and pending is not None else now_s
            spent_s = math.fsum(c.device_s for c in state.policy.charges if c.time_s >= since_s)
            gained = stage == "settled"
            state.policy = end_update(state.policy, arm, now_s, drop, gained=gained, decided=decided, spent_s=spent_s)
        if mine:
            state.pending = None

    def bar(self, record: LedgerRecord, now_s: float) -> None:
        """Leave an earlier version that could not be used alone for a while: it would be chosen again and again."""
        state, config = self._journal.state, self._journal.config
        if record.action == PROBE and record.candidate_version and self._arm(record).restores:
            version = record.candidate_version
            state.policy = learn_barred(state.policy, version, now_s, config.evidence_half_life_s)

    def _arm(self, record: LedgerRecord) -> Arm:
        """The arm of a record; one that is no longer configured is of the same sort."""
        pending = self._journal.state.pending
        mine = pending is not None and pending.decision_id == record.decision_id
        gone = Arm(name=record.arm, restores=mine and pending is not None and bool(pending.option.version))
        return next((arm for arm in self._journal.config.arms if arm.name == record.arm), gone)


def retry_or_end(recovery: Recovery, record: LedgerRecord, now_s: float, why: str) -> str:
    """End ``record``; if even that fails, say so and leave it open for the next step."""
    try:
        recovery.end(record, now_s, why)
    except ActionError as error:
        return f"{record.decision_id} could not be ended: {error}"
    return ""

"""The bandit's loop: read, decode, learn once, snapshot, acknowledge; then decide or move the pending update on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from specblock.bandit.actions import Actions
from specblock.bandit.clock import is_due
from specblock.bandit.codec import dumps, loads
from specblock.bandit.config import PolicyConfig, ServiceConfig
from specblock.bandit.context import watch_presence
from specblock.bandit.deciding import Decider
from specblock.bandit.errors import BanditError, SnapshotError, StreamError
from specblock.bandit.events import AcceptanceEvent
from specblock.bandit.inbox import Inbox, read_entry
from specblock.bandit.ledger import Ledger, LedgerRecord
from specblock.bandit.lifecycle import Lifecycle
from specblock.bandit.outside import ActionError
from specblock.bandit.recovery import retry_or_end
from specblock.bandit.snapshot import SnapshotStore
from specblock.bandit.state import BanditState
from specblock.bandit.status import BanditStatus, LoopCounters, StepReport, build_status
from specblock.bandit.stream_types import Stream, StreamEntry

logger = logging.getLogger(__name__)

RETRY_S = 10.0
"""Pause after the outside world failed to move an update on or to end it."""


class BanditService:
    """One consumer of the event stream and the owner of the state, the ledger and the decision.

    Everything is rebuilt from ``config.directory`` at construction; nothing outside is called before the first step.
    One thread may call ``step`` or ``run``; ``status``, ``pause``, ``resume`` and ``decide_now`` may come from any.

    Args:
        stream: of acceptance events.
        actions: the outside world.
        policy: decision rule.
        config: pace and places.
        understand: the event of a stream entry; by default its wire format is read.

    Raises:
        SnapshotError: snapshots exist and none can be used.
        LedgerError: the ledger is damaged in its middle.
    """

    def __init__(
        self,
        stream: Stream,
        actions: Actions,
        policy: PolicyConfig,
        config: ServiceConfig,
        understand: Callable[[StreamEntry], AcceptanceEvent] = read_entry,
    ) -> None:
        directory = Path(config.directory)
        self._stream, self._actions, self._policy, self._config = stream, actions, policy, config
        self._snapshots = SnapshotStore(directory / "snapshots", config.keep_snapshots)
        self._ledger = Ledger(directory / "ledger.jsonl")
        self.state = self._restore()
        self._lifecycle = Lifecycle(self.state, self._ledger, actions, policy)
        self.counters = LoopCounters(ledger_repaired_bytes=self._ledger.repaired_bytes)
        self._inbox = Inbox(stream, self.state, policy, self.counters, config.read_count, understand)
        self._decider = Decider(
            self.state,
            self._ledger,
            self._lifecycle,
            actions,
            policy,
            lambda now_s: self._save(now_s, True),
            config.ledger_sync_every_s,
        )
        self._dirty = False
        self._snapshot_s = self._failed_s = float("-inf")
        self._paused = threading.Event()
        if self.state.paused:
            self._paused.set()
        self._now = threading.Event()
        self._status = self._build_status()

    def step(self, now_s: float) -> StepReport:
        """One iteration: whatever is there is learned, at most one stage of an update is done. Never waits for events.

        Args:
            now_s: wall clock, Unix seconds, the same clock as the events'.

        Raises:
            StreamError: the stream did not answer in its bounded number of tries; nothing is lost.
            OSError: the ledger could not be written; the action it announces was not started.
        """
        before = replace(self.counters)
        self._inbox.take(now_s)
        watch_presence(self.state, now_s, self._policy)
        durable = self._persist(now_s) if self._due_for_snapshot(now_s) else True
        error = ""
        if durable and not self._paused.is_set():
            error = self._adapt(now_s)
        if error:
            self.counters.action_errors += 1
            logger.warning("bandit: %s", error)
        self._status = self._build_status()
        return StepReport.between(before, self.counters, self._status.stage, error)

    def run(self, stop: threading.Event, clock: Callable[[], float]) -> None:
        """Step until ``stop``; a stream or disk that is away is waited for. Ends with a snapshot."""
        while not stop.is_set():
            try:
                idle = self.step(clock()).read == 0
            except StreamError as error:
                self.counters.stream_errors += 1
                logger.warning("bandit: %s", error)
                idle = True
            except (BanditError, OSError) as error:
                self.counters.step_errors += 1
                logger.error("bandit: a step failed, the next one starts from what is recorded: %s", error)
                idle = True
            except Exception:
                # A bug: a loop that ended here would leave a service that answers and does nothing.
                self.counters.step_errors += 1
                logger.exception("bandit: a step failed, the next one starts from what is recorded")
                idle = True
            if idle:
                stop.wait(self._config.block_s)
        self.close(clock())

    def close(self, now_s: float) -> None:
        """Last snapshot and acknowledgement, then close the ledger."""
        try:
            self._persist(now_s)
        except StreamError as error:
            logger.warning("bandit: acknowledgements are left for the next start: %s", error)
        self._ledger.close()

    def status(self) -> BanditStatus:
        """As of the end of the last step, or of the stage that is under way."""
        return self._status

    def pause(self) -> None:
        """Go on learning, decide nothing; an update under way waits. Survives a restart."""
        self._paused.set()

    def resume(self) -> None:
        """Decide again."""
        self._paused.clear()

    def decide_now(self) -> None:
        """Decide at the next step, whatever the pace."""
        self._now.set()

    def _restore(self) -> BanditState:
        loaded = self._snapshots.load()
        if loaded is None:
            state = BanditState()
        else:
            for reason in loaded.refused:
                logger.warning("bandit: snapshot refused: %s", reason)
            try:
                # What another version of the daemon knew in a shape of its own is forgotten; the rest is kept.
                state = loads(BanditState, loaded.text, ignore_unknown=True)
            except (ValueError, TypeError) as error:
                raise SnapshotError(f"{loaded.path.name} does not fit this version: {error}") from error
        # The ledger may be ahead of the snapshot: a number is never used twice, and what was spent stays spent.
        numbered = max(state.policy.decisions, self._ledger.next_number)
        charges = self._ledger.charges if self._ledger.last_record else state.policy.charges
        state.policy = replace(state.policy, decisions=numbered, charges=charges)
        return state

    def _due_for_snapshot(self, now_s: float) -> bool:
        waiting = self._dirty or self._inbox.waiting or self.state.paused != self._paused.is_set()
        return waiting and is_due(now_s, self._snapshot_s, self._config.snapshot_every_s)

    def _persist(self, now_s: float) -> bool:
        """Snapshot, then acknowledge; False when the disk refused (then nothing is acknowledged or decided)."""
        if self._dirty or self._inbox.unsaved or self.state.paused != self._paused.is_set():
            self.state.paused = self._paused.is_set()
            if self._config.keep_snapshots and not self._save_snapshot():
                return False
            self._dirty = self._inbox.unsaved = False
        self._snapshot_s = now_s
        self._inbox.ack()
        return True

    def _save_snapshot(self) -> bool:
        try:
            self._snapshots.save(dumps(self.state))
        except OSError as error:
            self.counters.snapshot_errors += 1
            logger.error("bandit: no snapshot could be written, events stay unacknowledged: %s", error)
            return False
        self.counters.snapshots += 1
        return True

    def _adapt(self, now_s: float) -> str:
        """Recover, move the update on, or decide; returns what failed."""
        if not is_due(now_s, self._failed_s, RETRY_S):
            return ""
        if orphans := self._lifecycle.recovery.orphans():
            return self._recover(orphans, now_s)
        if self.state.pending is not None:
            changed, error = self._lifecycle.advance(now_s)
            if error and self.state.pending is not None:
                self._failed_s = now_s
            self._save(now_s, changed)
            return error
        waited = is_due(now_s, self.state.last_decision_s, self._config.decide_every_s)
        enough = self.state.learned - self.state.learned_at_decision >= self._config.decide_every_events
        if not (self._now.is_set() or (waited and enough)):
            return ""
        asked = self._now.is_set()
        self._now.clear()
        try:
            return self._decider.decide(now_s)
        except ActionError as error:
            if asked:
                self._now.set()
            self.state.last_decision_s = now_s
            return f"no decision could be taken: {error}"

    def _recover(self, orphans: tuple[LedgerRecord, ...], now_s: float) -> str:
        problems = []
        for record in orphans:
            why = f"interrupted after {record.stage!r}; the action is charged and not repeated"
            problems.append(retry_or_end(self._lifecycle.recovery, record, now_s, why))
        if any(problems):
            self._failed_s = now_s
        self._save(now_s, True)
        return "; ".join(problem for problem in problems if problem)

    def _save(self, now_s: float, changed: bool) -> None:
        """Make a change of the update or the policy durable at once."""
        if changed:
            self._dirty = True
            self._status = self._build_status()
            self._persist(now_s)

    def _build_status(self) -> BanditStatus:
        return build_status(self.state, self._ledger, self.counters, paused=self._paused.is_set())

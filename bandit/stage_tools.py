"""What the stages of an update share: recording what begins, measuring and charging, ending early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from specblock.bandit.actions import Actions, CompareReport, Mix
from specblock.bandit.config import PolicyConfig
from specblock.bandit.cost import Belief, charge_s
from specblock.bandit.estimate import WHOLE
from specblock.bandit.forecast import score_s, shown_share, train_s
from specblock.bandit.gate import Saving, pooled_saving, reversed_saving
from specblock.bandit.learning import (
    learn_comparison,
    learn_gain,
    learn_pairs,
    learn_parity,
    learn_score,
    learn_shown,
)
from specblock.bandit.ledger import Ledger, LedgerRecord
from specblock.bandit.outside import Journal, attempt
from specblock.bandit.parity import ParityEvidence
from specblock.bandit.parity import judge as judge_parity
from specblock.bandit.recovery import Recovery
from specblock.bandit.state import BanditState, PendingUpdate


class StageTools:
    """State, ledger and outside world of an update, and the moves that several stages make."""

    def __init__(self, state: BanditState, ledger: Ledger, actions: Actions, config: PolicyConfig) -> None:
        self.state, self.ledger, self.actions, self.config = state, ledger, actions, config
        self.journal = Journal(state, ledger, actions, config)
        self.recovery = Recovery(self.journal)

    def served(self, pending: PendingUpdate, wanted: int, now_s: float) -> bool:
        """Whether the live version has served ``wanted`` requests, or waiting for them ends."""
        served = self.state.totals(pending.new_version).requests - pending.requests_mark
        return served >= wanted or now_s >= pending.deadline_s

    def finished(self, domains: Sequence[str]) -> int:
        """Requests of these domains that finished so far, by any version; without domains of all."""
        if not domains:
            return self.state.requests
        return sum(known.requests for name in domains if (known := self.state.domains.get(name)))

    def begin(
        self,
        pending: PendingUpdate,
        stage: str,
        now_s: float,
        *,
        train: float = 0.0,
        candidate_version: str = "",
        charged_s: float = 0.0,
    ) -> None:
        """Record that an action is about to start and what it should cost: training, or else one scoring."""
        config, policy = self.config, self.state.policy
        arm = config.arm(pending.arm)
        seconds = train_s(arm, train, policy, config).mean if train else score_s(policy, config).mean
        self.journal.write(
            pending.decision_id,
            stage,
            now_s,
            candidate_version=candidate_version or pending.new_version or pending.candidate_version,
            expected_s=charge_s(config.cost, device_s=seconds, train_s=seconds if train else 0.0),
            charged_s=charged_s,
        )

    def move(self, **changes: object) -> None:
        """The pending update with ``changes``."""
        assert self.state.pending is not None
        self.state.pending = replace(self.state.pending, **changes)  # type: ignore[arg-type]

    def compare(self, old: str, new: str, after_s: float | None, mix: Mix | None = None) -> tuple[CompareReport, float]:
        """Paired replay of two versions, and what it is charged with; its cost is learned."""
        report = attempt(lambda: self.actions.compare(old, new, after_s, mix))
        self.state.policy = learn_pairs(self.state.policy, len(report.rows), report.device_s)
        return report, charge_s(self.config.cost, device_s=report.device_s)

    def parity(self, version: str, now_s: float, after_s: float | None = None) -> tuple[ParityEvidence, float]:
        """The parity of a version, and what the check is charged with; cost and outcome are learned."""
        report = attempt(lambda: self.actions.parity(version, after_s))
        evidence = judge_parity(report.rows, self.config.parity)
        policy = learn_score(self.state.policy, report.device_s)
        self.state.policy = learn_parity(policy, version, now_s, evidence, self.state.changes)
        return evidence, charge_s(self.config.cost, device_s=report.device_s)

    def learn_trial(self, pending: PendingUpdate, saving: Saving, now_s: float) -> None:
        """Learn what a trial that nothing follows says about the gain of its arm."""
        arm = self.config.arm(pending.arm)
        self._learn_gain(pending, saving, now_s, shown_share(arm, self.state.policy))

    def learn(self, pending: PendingUpdate, saving: Saving, now_s: float) -> None:
        """Learn what the complete update saved, and what share of it its trial had shown."""
        arm, trial = self.config.arm(pending.arm), pending.trial
        self._learn_gain(pending, saving, now_s, WHOLE)
        if trial:
            self.state.policy = learn_shown(self.state.policy, arm, pending.targets, trial, saving)

    def remember(self, version: str, against: str, saving: Saving, now_s: float) -> None:
        """How a stored version compares with the one that serves, for restoring."""
        self.state.policy = learn_comparison(self.state.policy, version, against, saving, now_s)

    def _learn_gain(self, pending: PendingUpdate, saving: Saving, now_s: float, seen: Belief) -> None:
        arm, version, policy = self.config.arm(pending.arm), pending.option.version, self.state.policy
        self.state.policy = learn_gain(policy, arm, pending.targets, saving, self.config, now_s, seen, version)
        if version:
            self.remember(version, pending.base_version, saving, now_s)
        if pending.new_version:  # what served before could be restored
            self.remember(pending.base_version, pending.new_version, reversed_saving(saving), now_s)

    def reject(self, pending: PendingUpdate, now_s: float, reason: str, *, decided: bool) -> None:
        """End an update at the gate, which failed it (``decided``) or left it open; what it would save is learned."""
        record, rows = self.ledger.open_record(pending.decision_id), self.state.pending
        assert record is not None and rows is not None
        self.learn(pending, pooled_saving(rows.rows), now_s)
        self.drop(record, "rejected", now_s, reason, decided=decided)

    def drop(
        self,
        record: LedgerRecord,
        stage: str,
        now_s: float,
        reason: str,
        charged_s: float | None = None,
        *,
        decided: bool = True,
    ) -> None:
        """End an update that never served (or was refused) and forget its candidate."""
        problem = self.journal.discard(record.candidate_version)
        self.recovery.finish(record, stage, now_s, reason + problem, charged_s=charged_s, decided=decided)

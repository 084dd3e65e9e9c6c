"""One update from the decision to its realised gain: a state machine that moves at most one stage per step.

    probing -> training -> gating ... gating -> promoting -> verifying -> settling -> settled
       |                     |                    |            |             |
    abandoned             rejected            abandoned    rolled_back   rolled_back

Every outside action is recorded before it starts. Waiting (for conversations at the gate, for live requests after the
promotion) is returning without having done anything.
"""

from __future__ import annotations

import math
from dataclasses import replace

from specblock.bandit.actions import Actions, CompareReport, PairedReplay, ParityRow, WindowSummary
from specblock.bandit.config import PolicyConfig
from specblock.bandit.context import build_context
from specblock.bandit.cost import charge_s
from specblock.bandit.decision import CONTINUE, Probed
from specblock.bandit.evidence import gate_numbers, parity_numbers, parity_words, saving_numbers
from specblock.bandit.forecast import score_s, train_s
from specblock.bandit.gate import Saving, gate_rows, judge, pooled_saving
from specblock.bandit.intervals import one_sided_z
from specblock.bandit.learning import learn_gain, learn_parity, learn_score, learn_stall, learn_training
from specblock.bandit.ledger import Ledger, LedgerRecord
from specblock.bandit.outside import ActionError, Journal, attempt
from specblock.bandit.parity import ParityEvidence
from specblock.bandit.parity import judge as judge_parity
from specblock.bandit.policy import decide
from specblock.bandit.recovery import BEGUN, LIVE, Recovery, retry_or_end
from specblock.bandit.state import Accrual, BanditState, PendingUpdate

ROLLBACK_CONFIDENCE = 0.95
"""One-sided confidence that a live version loses before it is taken back."""


class Lifecycle:
    """Moves the pending update on. Reads and writes ``state``; the caller makes it durable after each step."""

    def __init__(self, state: BanditState, ledger: Ledger, actions: Actions, config: PolicyConfig) -> None:
        self._state, self._actions, self._config = state, actions, config
        self._ledger = ledger
        self._journal = Journal(state, ledger, actions, config)
        self.recovery = Recovery(self._journal)

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
            evidence, cost_s = self._parity(version, now_s)
        except ActionError as error:
            record = self._ledger.open_record(decision_id)
            assert record is not None
            return retry_or_end(self.recovery, record, now_s, f"the check failed: {error}") or str(error)
        self._journal.write(
            decision_id, "checked", now_s, parity_words(evidence), charged_s=cost_s, numbers=parity_numbers(evidence)
        )
        return ""

    def close_accrual(self, serving_version: str, now_s: float) -> None:
        """Book what a settled version saved since, once it no longer serves."""
        accrual = self._state.accrual
        if accrual is None or accrual.version == serving_version:
            return
        saved_s = accrued_s(self._state, accrual)
        if not self._ledger.knows(accrual.decision_id, "closed"):
            self._ledger.append(
                LedgerRecord(
                    decision_id=accrual.decision_id,
                    stage="closed",
                    time_s=now_s,
                    action="probe",
                    candidate_version=accrual.version,
                    reason=f"it saved {saved_s:.1f} device-seconds after it was settled",
                    numbers={"realised_s": saved_s},
                )
            )
        self._state.accrual = None

    def _advance(self, pending: PendingUpdate, record: LedgerRecord, now_s: float) -> bool:
        live = record.stage in LIVE
        serving = attempt(self._actions.serving_version)
        if serving != (pending.new_version if live else pending.base_version):
            self.recovery.end(record, now_s, f"superseded: {serving} was made to serve meanwhile")
            return True
        stages = {
            "probing": self._probe,
            "training": self._train,
            "gating": self._gate,
            "promoting": self._promote,
            "verifying": self._verify,
            "settling": self._settle,
        }
        return stages[pending.stage](pending, now_s)

    def _probe(self, pending: PendingUpdate, now_s: float) -> bool:
        config, key, arm = self._config, pending.decision_id, self._config.arm(pending.arm)
        share = config.probe_fraction
        self._begin(pending, "probing", now_s, train=share)
        trained = attempt(lambda: self._actions.train(key, arm, pending.base_version, share, resume=False))
        self._state.policy = learn_training(self._state.policy, arm, share, trained)
        candidate = trained.candidate_version
        self._begin(
            pending,
            "scoring",
            now_s,
            candidate_version=candidate,
            charged_s=charge_s(config.cost, device_s=trained.device_s, train_s=trained.train_s),
        )
        report, cost_s = self._compare(pending.base_version, candidate, None)
        saving = pooled_saving(gate_rows(report))
        context = build_context(self._state, WindowSummary(), pending.base_version, now_s, config)
        probed = Probed(arm=arm.name, targets=pending.targets, saving=saving)
        decision, self._state.policy = decide(replace(context, probed=probed), self._state.policy, config)
        record = self._journal.write(
            key,
            "probed",
            now_s,
            decision.reason,
            charged_s=cost_s,
            options=decision.options,
            numbers=saving_numbers(saving),
        )
        if decision.action != CONTINUE:
            self._learn(pending, saving, arm.probe_gain_share)
            self._drop(record, "abandoned", now_s, decision.reason)
            return True
        self._move(stage="training", candidate_version=candidate, option=decision.option() or pending.option)
        return True

    def _train(self, pending: PendingUpdate, now_s: float) -> bool:
        config, arm = self._config, self._config.arm(pending.arm)
        rest = 1 - config.probe_fraction
        self._begin(pending, "training", now_s, train=rest)
        report = attempt(lambda: self._actions.train(pending.decision_id, arm, pending.base_version, 1.0, resume=True))
        self._state.policy = learn_training(self._state.policy, arm, rest, report)
        self._journal.write(
            pending.decision_id,
            "trained",
            now_s,
            f"{report.positions} positions in {report.train_s:.1f} s",
            candidate_version=report.candidate_version,
            charged_s=charge_s(config.cost, device_s=report.device_s, train_s=report.train_s),
            numbers={"train_s": report.train_s, "positions": float(report.positions)},
        )
        self._move(
            stage="gating",
            candidate_version=report.candidate_version,
            cutoff_s=report.cutoff_time_s,
            deadline_s=now_s + report.train_s + config.gate.deadline_s,
            requests_mark=self._state.requests,
            next_look=config.gate.first_look_requests,
        )
        return True

    def _gate(self, pending: PendingUpdate, now_s: float) -> bool:
        rules, requests = self._config.gate, self._state.requests - pending.requests_mark
        if requests < pending.next_look and now_s < pending.deadline_s:
            return False
        if requests < pending.next_look:
            self._reject(pending, now_s, f"undecided at the deadline with {len(pending.rows)} conversations")
            return True
        look = pending.looks + 1
        self._begin(pending, f"gating-{look}", now_s)
        report, cost_s = self._compare(pending.base_version, pending.candidate_version, pending.cutoff_s)
        seen = {row.conversation_id for row in pending.rows}
        fresh = [r for r in gate_rows(report) if r.time_s > pending.cutoff_s and r.conversation_id not in seen]
        rows = (*pending.rows, *fresh)
        evidence = judge(rows, pending.scale_s, rules)
        numbers = gate_numbers(evidence)
        self._journal.write(
            pending.decision_id, f"gated-{look}", now_s, evidence.reason, charged_s=cost_s, numbers=numbers
        )
        next_look = math.ceil(requests * rules.look_growth)
        self._move(stage="gating", looks=look, rows=rows, next_look=next_look)
        if evidence.verdict == "pass":
            self._move(stage="promoting")
        elif evidence.verdict == "fail":
            self._reject(pending, now_s, evidence.reason)
        return True

    def _promote(self, pending: PendingUpdate, now_s: float) -> bool:
        config, key = self._config, pending.decision_id
        expected_s = charge_s(config.cost, stall_s=pending.option.value.stall_s)
        self._journal.write(key, "promoting", now_s, expected_s=expected_s)
        swap = attempt(lambda: self._actions.promote(key, pending.candidate_version))
        self._state.policy = learn_stall(self._state.policy, swap.stall_s)
        cost_s = charge_s(config.cost, stall_s=swap.stall_s)
        if not swap.ok:
            record = self._ledger.open_record(key)
            assert record is not None
            self._drop(record, "abandoned", now_s, f"the promotion was refused: {swap.detail}", charged_s=cost_s)
            return True
        self._journal.write(
            key,
            "promoted",
            now_s,
            swap.detail,
            candidate_version=swap.version,
            charged_s=cost_s,
            options=(pending.option,),
        )
        self.close_accrual(swap.version, now_s)
        served = self._state.totals(swap.version)
        self._move(
            stage="verifying",
            new_version=swap.version,
            promoted_s=now_s,
            requests_mark=served.requests,
            tokens_mark=served.tokens,
            deadline_s=now_s + config.gate.settle_deadline_s,
        )
        return True

    def _verify(self, pending: PendingUpdate, now_s: float) -> bool:
        if not self._served(pending, self._config.gate.verify_requests, now_s):
            return False
        self._begin(pending, "verifying", now_s)
        evidence, cost_s = self._parity(pending.new_version, now_s)
        words, numbers = parity_words(evidence), parity_numbers(evidence)
        record = self._journal.write(pending.decision_id, "verified", now_s, words, charged_s=cost_s, numbers=numbers)
        self._move(stage="settling")
        if evidence.verdict == "broken":
            self.recovery.roll_back(record, now_s, words)
        return True

    def _settle(self, pending: PendingUpdate, now_s: float) -> bool:
        if not self._served(pending, self._config.gate.settle_requests, now_s):
            return False
        self._begin(pending, "settling", now_s)
        report, cost_s = self._compare(pending.base_version, pending.new_version, pending.promoted_s)
        live = [row for row in report.rows if row.live_version == pending.new_version and row.live_cycles > 0]
        saving = pooled_saving(gate_rows(replace(report, rows=tuple(_as_served(row) for row in live))))
        record = self._ledger.open_record(pending.decision_id)
        assert record is not None
        if saving.conversations < 2:
            reason = "too few live conversations to measure its realised gain"
            self.recovery.finish(record, "settled", now_s, reason, charged_s=cost_s, gained=True)
            return True
        self._learn(pending, saving, 1.0)
        if loss := self._live_loss(live, saving):
            self.recovery.roll_back(replace(record, expected_s=cost_s), now_s, loss)
        else:
            self._settled(pending, record, saving, cost_s, now_s)
        return True

    def _settled(
        self, pending: PendingUpdate, record: LedgerRecord, saving: Saving, cost_s: float, now_s: float
    ) -> None:
        tokens = self._state.totals(pending.new_version).tokens
        realised_s = saving.s_per_token * (tokens - pending.tokens_mark)
        reason = (
            f"it saved {saving.relative:+.1%} (standard error {saving.se:.1%}) on {saving.conversations} conversations "
            f"served live, {realised_s:+.1f} device-seconds so far; predicted were {pending.option.value.gain:+.1%}"
        )
        numbers = {**saving_numbers(saving), "realised_s": realised_s, "predicted_gain": pending.option.value.gain}
        gained = saving.relative > 0
        self.recovery.finish(record, "settled", now_s, reason, charged_s=cost_s, gained=gained, numbers=numbers)
        self._state.accrual = Accrual(
            decision_id=pending.decision_id,
            version=pending.new_version,
            saving_s_per_token=saving.s_per_token,
            tokens_mark=tokens,
        )

    def _live_loss(self, live: list[PairedReplay], saving: Saving) -> str:
        """Why a live version must go; empty if it may stay."""
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
            self._config.parity,
        )
        if parity.verdict == "broken":
            return parity_words(parity)
        if saving.relative + one_sided_z(ROLLBACK_CONFIDENCE) * saving.se < 0:
            return f"live it costs {-saving.relative:.1%} more per token than the version before"
        return ""

    def _served(self, pending: PendingUpdate, wanted: int, now_s: float) -> bool:
        served = self._state.totals(pending.new_version).requests - pending.requests_mark
        return served >= wanted or now_s >= pending.deadline_s

    def _begin(
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
        config, policy = self._config, self._state.policy
        arm = config.arm(pending.arm)
        seconds = train_s(arm, train, policy, config).mean if train else score_s(policy, config).mean
        self._journal.write(
            pending.decision_id,
            stage,
            now_s,
            candidate_version=candidate_version or pending.new_version or pending.candidate_version,
            expected_s=charge_s(config.cost, device_s=seconds, train_s=seconds if train else 0.0),
            charged_s=charged_s,
        )

    def _move(self, **changes: object) -> None:
        """The pending update with ``changes``."""
        assert self._state.pending is not None
        self._state.pending = replace(self._state.pending, **changes)  # type: ignore[arg-type]

    def _compare(self, old: str, new: str, after_s: float | None) -> tuple[CompareReport, float]:
        report = attempt(lambda: self._actions.compare(old, new, after_s))
        self._state.policy = learn_score(self._state.policy, report.device_s)
        return report, charge_s(self._config.cost, device_s=report.device_s)

    def _parity(self, version: str, now_s: float) -> tuple[ParityEvidence, float]:
        report = attempt(lambda: self._actions.parity(version))
        evidence = judge_parity(report.rows, self._config.parity)
        changes = sum(domain.changes for domain in self._state.domains.values())
        policy = learn_score(self._state.policy, report.device_s)
        self._state.policy = learn_parity(policy, version, now_s, evidence, changes)
        return evidence, charge_s(self._config.cost, device_s=report.device_s)

    def _learn(self, pending: PendingUpdate, saving: Saving, seen: float) -> None:
        arm = self._config.arm(pending.arm)
        self._state.policy = learn_gain(self._state.policy, arm, pending.targets, saving, seen)

    def _reject(self, pending: PendingUpdate, now_s: float, reason: str) -> None:
        record, rows = self._ledger.open_record(pending.decision_id), self._state.pending
        assert record is not None and rows is not None
        self._learn(pending, pooled_saving(rows.rows), 1.0)
        self._drop(record, "rejected", now_s, reason)

    def _drop(
        self, record: LedgerRecord, stage: str, now_s: float, reason: str, charged_s: float | None = None
    ) -> None:
        problem = self._journal.discard(record.candidate_version)
        self.recovery.finish(record, stage, now_s, reason + problem, charged_s=charged_s)


def accrued_s(state: BanditState, accrual: Accrual) -> float:
    """Device-seconds that a settled version has saved since it was settled."""
    return accrual.saving_s_per_token * (state.totals(accrual.version).tokens - accrual.tokens_mark)


def _as_served(row: PairedReplay) -> PairedReplay:
    """The row with the cycles that were really needed live in place of the replayed ones."""
    return replace(row, cycles_new=row.live_cycles)

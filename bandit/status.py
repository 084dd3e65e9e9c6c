"""What the service tells the command line and the metrics: immutable, safe to read from any thread."""

from __future__ import annotations

from dataclasses import dataclass, fields

from specblock.bandit.accrual import accrued_s
from specblock.bandit.ledger import Balance, Ledger, LedgerRecord
from specblock.bandit.parity import ParityEvidence
from specblock.bandit.state import BanditState

IDLE, PAUSED = "idle", "paused"


@dataclass(slots=True, kw_only=True)
class LoopCounters:
    """Counts since the process started."""

    read: int = 0
    learned: int = 0
    duplicates: int = 0
    parked: int = 0
    acked: int = 0
    snapshots: int = 0
    snapshot_errors: int = 0
    stream_errors: int = 0
    step_errors: int = 0
    action_errors: int = 0
    ledger_repaired_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one step did.

    Attributes:
        stage: what the service is at afterwards: idle, paused, or the pending update's next stage.
        error: what failed outside, in words; empty if nothing did.
    """

    read: int
    learned: int
    duplicates: int
    parked: int
    acked: int
    stage: str
    error: str

    @staticmethod
    def between(before: LoopCounters, after: LoopCounters, stage: str, error: str) -> StepReport:
        """The difference of two readings of the counters."""
        return StepReport(
            read=after.read - before.read,
            learned=after.learned - before.learned,
            duplicates=after.duplicates - before.duplicates,
            parked=after.parked - before.parked,
            acked=after.acked - before.acked,
            stage=stage,
            error=error,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainStatus:
    """One domain under the newest version it was served with."""

    domain: str
    version: str
    acceptance: float
    cycles: int
    requests: int
    survival: tuple[float, ...]
    """Share of cycles that accepted at least 1, 2, ... draft tokens."""
    changes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BanditStatus:
    """The service at a glance.

    Attributes:
        stage: idle, paused, or the pending update's next stage.
        decision_id: of the pending update.
        lost_events: sent and never received.
        missing_events: not yet received, but may still arrive.
        accrued_s: device-seconds the serving version has saved since it was settled; not yet in the ledger.
        open_records: newest stage of every update or check that has not ended.
        last_record: newest line of the ledger.
    """

    stage: str
    decision_id: str
    arm: str
    candidate_version: str
    learned: int
    flagged: int
    lost_events: int
    missing_events: int
    decisions: int
    balance: Balance
    accrued_s: float
    parity: ParityEvidence | None
    domains: tuple[DomainStatus, ...]
    open_records: tuple[LedgerRecord, ...]
    last_record: LedgerRecord | None
    counters: LoopCounters


def build_status(state: BanditState, ledger: Ledger, counters: LoopCounters, *, paused: bool) -> BanditStatus:
    """A copy of everything worth showing."""
    pending = state.pending
    return BanditStatus(
        stage=PAUSED if paused else pending.stage if pending else IDLE,
        decision_id=pending.decision_id if pending else "",
        arm=pending.arm if pending else "",
        candidate_version=(pending.new_version or pending.candidate_version) if pending else "",
        learned=state.learned,
        flagged=state.flagged,
        lost_events=state.watermarks.lost,
        missing_events=state.watermarks.missing,
        decisions=state.policy.decisions,
        balance=ledger.balance,
        accrued_s=accrued_s(state, state.accrual) if state.accrual else 0.0,
        parity=state.policy.parity.evidence if state.policy.parity else None,
        domains=tuple(_domain(name, state) for name in sorted(state.domains) if state.domains[name].versions),
        open_records=ledger.open_records(),
        last_record=ledger.last_record,
        counters=LoopCounters(**{f.name: getattr(counters, f.name) for f in fields(counters)}),
    )


def _domain(name: str, state: BanditState) -> DomainStatus:
    versions = state.domains[name].versions
    version = max(versions, key=lambda key: (versions[key].last_time_s, key))
    found = versions[version]
    cycles, tokens = sum(s.cycles for s in found.recent), sum(s.tokens for s in found.recent)
    return DomainStatus(
        domain=name,
        version=version,
        acceptance=tokens / cycles if cycles else 0.0,
        cycles=found.total_cycles,
        requests=found.requests,
        survival=tuple(reached / found.cycles for reached in found.survival) if found.cycles else (),
        changes=state.domains[name].changes,
    )

"""What a line of the ledger says, and what all lines together come to."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from specblock.bandit.codec import from_plain
from specblock.bandit.decision import CHECK, PROBE, Charge, DecisionContext, Option, PolicyState
from specblock.bandit.errors import LedgerError

DECIDED = "decided"
TERMINAL = frozenset({"checked", "settled", "rejected", "abandoned", "rolled_back", "closed"})
"""Stages after which nothing more happens to an update (``closed`` books what it saved after it was settled)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRecord:
    """One line of the ledger.

    Attributes:
        decision_id: ``d000017``; all stages of an update share it.
        stage: what happened: decided, probing, probed, training, trained, gating-n, gated-n, promoting, promoted,
            verifying, verified, settling, rolling_back, or one of ``TERMINAL``.
        time_s: wall clock, Unix seconds.
        action: skip, check_parity or probe.
        verdict: none, drift, fault or load_or_sampling.
        reason: in words.
        expected_s: device-seconds that the action about to start is expected to cost; charged if it is interrupted.
        charged_s: device-seconds spent since the previous record of this decision, weighted by the prices.
        options: predicted net values.
        probability: that the rule takes this action on these inputs; below 1 where it explores.
        numbers: measurements, names with units.
        inputs_sha256: of (context, policy state, configuration); the same inputs give the same decision.
        context: everything the decision read.
        policy_state: what the rule knew before it decided; at rest only if it changed since the decision before.
    """

    decision_id: str
    stage: str
    time_s: float
    action: str
    arm: str = ""
    verdict: str = ""
    reason: str = ""
    base_version: str = ""
    candidate_version: str = ""
    expected_s: float = 0.0
    charged_s: float = 0.0
    options: tuple[Option, ...] = ()
    probability: float = 1.0
    numbers: dict[str, float] = field(default_factory=dict)
    inputs_sha256: str = ""
    context: DecisionContext | None = None
    policy_state: PolicyState | None = None

    def option(self) -> Option | None:
        """The prediction for this record's arm."""
        return next((option for option in self.options if option.value.arm == self.arm), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """What adaptation cost and brought, in serving device-seconds.

    Attributes:
        charged_s: training, scoring, probing, interference and stalls.
        predicted_s: expected savings of promoted updates over their horizons.
        realised_s: measured savings so far.
        decisions: records of stage "decided".
        skips: of these, skips.
        explored: trials of arms near the margin, by chance.
        promoted: updates that went live.
        rolled_back: of these, taken back.
    """

    charged_s: float = 0.0
    predicted_s: float = 0.0
    realised_s: float = 0.0
    decisions: int = 0
    skips: int = 0
    explored: int = 0
    promoted: int = 0
    rolled_back: int = 0

    @property
    def net_s(self) -> float:
        """Measured savings minus everything charged."""
        return self.realised_s - self.charged_s

    def add(self, record: LedgerRecord) -> Balance:
        """The balance after ``record``."""
        option = record.option()
        promoted = record.stage == "promoted"
        return Balance(
            charged_s=self.charged_s + record.charged_s,
            predicted_s=self.predicted_s + (option.value.benefit if promoted and option else 0.0),
            realised_s=self.realised_s + record.numbers.get("realised_s", 0.0),
            decisions=self.decisions + (record.stage == DECIDED),
            skips=self.skips + (record.stage == DECIDED and record.action not in (CHECK, PROBE)),
            explored=self.explored + (record.action == PROBE and record.stage == DECIDED and record.probability < 1),
            promoted=self.promoted + promoted,
            rolled_back=self.rolled_back + (record.stage == "rolled_back"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """What a new file of the ledger begins with: the index of everything before it.

    Attributes:
        parts: names of the closed parts before it, oldest first.
        balance: of them.
        next_number: of the next decision.
        charges: of the hour before it.
        stages: of the updates and checks that were written to last, which may still be booked on.
        last_record: the newest line, without its inputs.
    """

    parts: tuple[str, ...]
    balance: Balance
    next_number: int
    charges: tuple[Charge, ...]
    stages: dict[str, tuple[str, ...]]
    last_record: LedgerRecord | None


def parse_record(place: str, number: int, line: bytes, *, inputs: bool = True) -> LedgerRecord:
    """The record of one whole line; without ``inputs``, what the decision read is left out.

    Raises:
        LedgerError: it cannot be read; file and line are named.
    """
    try:
        plain = json.loads(line)
        if not inputs and isinstance(plain, dict):
            plain.update(context=None, policy_state=None)
        record: LedgerRecord = from_plain(LedgerRecord, plain, ignore_unknown=True)
    except ValueError as error:
        raise LedgerError(f"{place}:{number}: unreadable record: {error}") from error
    return record

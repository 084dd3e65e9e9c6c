"""The ledger: append-only JSON lines, one per decision and per later stage of an update, synchronised to disk.

A record is written *before* its action starts; a (decision, stage) that is already known is refused. That makes every
outside action at most once per decision, whatever crashes when. A line torn by a crash never started anything and is
cut off when the file is opened.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path

from specblock.bandit.codec import dumps, from_plain
from specblock.bandit.decision import CHECK, HOUR_S, PROBE, Charge, DecisionContext, Option, PolicyState
from specblock.bandit.errors import LedgerError

DECIDED = "decided"
TERMINAL = frozenset({"checked", "settled", "rejected", "abandoned", "rolled_back", "closed"})
"""Stages after which nothing more happens to an update (``closed`` books what it saved after it was settled)."""

_ID = re.compile(r"d(\d+)")


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


class Ledger:
    """The ledger file, and an index of it.

    ``balance`` sums it up, ``charges`` are those of the hour before its newest record.

    Args:
        path: created if missing.

    Raises:
        LedgerError: a line other than the last cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.balance = Balance()
        self.repaired_bytes = 0
        self.next_number = 0
        self.last_record: LedgerRecord | None = None
        self.charges: tuple[Charge, ...] = ()
        self._stages: dict[str, set[str]] = {}
        self._open: dict[str, LedgerRecord] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: FileIO = path.open("ab", buffering=0)
        _sync_directory(path.parent)
        self._load()

    def append(self, record: LedgerRecord, *, durable: bool = True) -> None:
        """Write one record; on disk when this returns (unless not ``durable``).

        Raises:
            LedgerError: the decision has been through this stage before.
            OSError: the disk refused; the file is as it was.
        """
        if self.knows(record.decision_id, record.stage):
            raise LedgerError(f"{record.decision_id} has been through stage {record.stage!r} already")
        line, size = dumps(record).encode() + b"\n", os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, "the ledger line was written in part only")
            if durable:
                os.fsync(self._file.fileno())
        except OSError:
            # Half a line must not stay in the middle of the file.
            os.ftruncate(self._file.fileno(), size)
            raise
        self._index(record)

    def knows(self, decision_id: str, stage: str) -> bool:
        """Whether (decision, stage) is recorded."""
        # Decisions that did nothing are known by their number alone; there are many of them.
        decided = stage == DECIDED and _number(decision_id) < self.next_number
        return decided or stage in self._stages.get(decision_id, ())

    def open_records(self) -> tuple[LedgerRecord, ...]:
        """The newest record of every update or check that has not ended, oldest decision first."""
        return tuple(self._open[key] for key in sorted(self._open))

    def open_record(self, decision_id: str) -> LedgerRecord | None:
        """The newest record of a decision that has not ended."""
        return self._open.get(decision_id)

    def records(self) -> Iterator[LedgerRecord]:
        """All records, oldest first."""
        return read_ledger(self.path)

    def tail(self, count: int) -> tuple[LedgerRecord, ...]:
        """The newest ``count`` records, oldest first."""
        return tuple(deque(self.records(), maxlen=count)) if count > 0 else ()

    def close(self) -> None:
        """Synchronise and close the file."""
        os.fsync(self._file.fileno())
        self._file.close()

    def _load(self) -> None:
        whole = 0
        # A ledger of months neither fits into memory nor needs its inputs there.
        with self.path.open("r+b") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                self._index(_parse(self.path, number, line, inputs=False))
                whole += len(line)
            self.repaired_bytes = os.fstat(file.fileno()).st_size - whole
            if self.repaired_bytes:
                file.truncate(whole)
                os.fsync(file.fileno())

    def _index(self, record: LedgerRecord) -> None:
        self.next_number = max(self.next_number, _number(record.decision_id) + 1)
        self.balance = self.balance.add(record)
        if record.charged_s > 0:
            self.charges = (*self.charges, Charge(record.time_s, record.charged_s))
        self.charges = tuple(charge for charge in self.charges if charge.time_s > record.time_s - HOUR_S)
        # A decision's inputs are only needed in the file.
        self.last_record = replace(record, context=None, policy_state=None)
        if record.stage == DECIDED and record.action not in (CHECK, PROBE):
            return
        self._stages.setdefault(record.decision_id, set()).add(record.stage)
        if record.stage in TERMINAL:
            self._open.pop(record.decision_id, None)
        else:
            self._open[record.decision_id] = self.last_record


def _number(decision_id: str) -> int:
    match = _ID.fullmatch(decision_id)
    if match is None:
        raise LedgerError(f"{decision_id!r} is not a decision id")
    return int(match.group(1))


def read_ledger(path: Path) -> Iterator[LedgerRecord]:
    """Records of a ledger file, oldest first; a torn last line is left out.

    Raises:
        LedgerError: a whole line cannot be read; the line is named.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            yield _parse(path, number, line, inputs=True)


def _parse(path: Path, number: int, line: bytes, *, inputs: bool) -> LedgerRecord:
    """The record of one whole line; without ``inputs``, what the decision read is left out."""
    try:
        plain = json.loads(line)
        if not inputs and isinstance(plain, dict):
            plain.update(context=None, policy_state=None)
        record: LedgerRecord = from_plain(LedgerRecord, plain, ignore_unknown=True)
    except ValueError as error:
        raise LedgerError(f"{path.name}:{number}: unreadable record: {error}") from error
    return record


def _sync_directory(directory: Path) -> None:
    """Make a new file in ``directory`` durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

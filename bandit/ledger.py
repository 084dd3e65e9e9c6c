"""The ledger: append-only JSON lines, one per decision and per later stage of an update, synchronised to disk.

A record is written *before* its action starts; a (decision, stage) that is already known is refused. That makes every
outside action at most once per decision, whatever crashes when. A line torn by a crash never started anything and is
cut off when the file is opened. A file that has grown large is closed between two updates and compressed, so that
opening the ledger and the newest decisions cost the same after years.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

from specblock.bandit.codec import dumps, from_plain
from specblock.bandit.decision import CHECK, HOUR_S, PROBE, Charge
from specblock.bandit.errors import LedgerError
from specblock.bandit.ledger_files import (
    CARRIED,
    carried_of,
    clean_up,
    compress,
    growing,
    ledger_lines,
    newest_lines,
    next_part,
    roll,
    sync_directory,
)
from specblock.bandit.ledger_record import DECIDED, TERMINAL, Balance, Carried, LedgerRecord, parse_record

__all__ = ["DECIDED", "TERMINAL", "Balance", "Ledger", "LedgerRecord", "read_balance", "read_ledger", "read_newest"]

_ID = re.compile(r"d(\d+)")
_KNOWN_UPDATES = 64  # newest updates and checks whose stages a new file remembers
_TRY_AGAIN = 16  # a file that could not be closed is tried again when it has grown by this part of its limit


class Ledger:
    """The ledger file, and an index of it.

    ``balance`` sums it up, ``charges`` are those of the hour before its newest record, ``parts`` its closed files.

    Args:
        path: created if missing.
        part_bytes: size at which the file is closed and another one begun.

    Raises:
        LedgerError: a line other than the last cannot be read.
    """

    def __init__(self, path: Path, part_bytes: int = 64 << 20) -> None:
        self.path = path
        self._part_bytes, self._roll_at = part_bytes, part_bytes
        self.parts: tuple[str, ...] = ()
        self.balance = Balance()
        self.repaired_bytes = 0
        self.next_number = 0
        self.last_record: LedgerRecord | None = None
        self.charges: tuple[Charge, ...] = ()
        self._stages: dict[str, set[str]] = {}
        self._open: dict[str, LedgerRecord] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        clean_up(path)
        self._file: FileIO = path.open("ab", buffering=0)
        sync_directory(path.parent)
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
        if size + len(line) >= self._roll_at and not self._open:
            self._roll(size + len(line))

    def knows(self, decision_id: str, stage: str) -> bool:
        """Whether (decision, stage) is recorded."""
        # Decisions that did nothing are known by their number alone; there are many of them.
        decided = stage == DECIDED and _number(decision_id) < self.next_number
        return decided or stage in self._stages.get(decision_id, ())

    def open_records(self) -> tuple[LedgerRecord, ...]:
        """The newest record of every update or check that has not ended, oldest decision first."""
        return tuple(self._open[key] for key in sorted(self._open, key=_number))

    def open_record(self, decision_id: str) -> LedgerRecord | None:
        """The newest record of a decision that has not ended."""
        return self._open.get(decision_id)

    def records(self) -> Iterator[LedgerRecord]:
        """All records, oldest first."""
        return read_ledger(self.path)

    def tail(self, count: int) -> tuple[LedgerRecord, ...]:
        """The newest ``count`` records, oldest first."""
        return read_newest(self.path, count)

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
                plain = carried_of(self.path.name, line) if number == 1 else None
                if plain is not None:
                    self._take(_carried(self.path.name, plain))
                else:
                    self._index(parse_record(self.path.name, number, line, inputs=False))
                whole += len(line)
            self.repaired_bytes = os.fstat(file.fileno()).st_size - whole
            if self.repaired_bytes:
                file.truncate(whole)
                os.fsync(file.fileno())

    def _take(self, carried: Carried) -> None:
        self.parts, self.balance, self.next_number = carried.parts, carried.balance, carried.next_number
        self.charges, self.last_record = carried.charges, carried.last_record
        self._stages = {key: set(stages) for key, stages in carried.stages.items()}

    def _roll(self, size: int) -> None:
        """Closes the file as a part and goes on in a new one; a disk that refuses is asked again later."""
        newest = list(self._stages)[-_KNOWN_UPDATES:]
        try:
            os.fsync(self._file.fileno())
            carried = Carried(
                parts=(*self.parts, next_part(self.path)),
                balance=self.balance,
                next_number=self.next_number,
                charges=self.charges,
                stages={key: tuple(sorted(self._stages[key])) for key in newest},
                last_record=self.last_record,
            )
            file = roll(self.path, carried.parts[-1], dumps({CARRIED: carried}).encode() + b"\n")
        except OSError:
            self._roll_at = size + self._part_bytes // _TRY_AGAIN
            return
        self._file.close()
        self._file, self.parts, self._roll_at = file, carried.parts, self._part_bytes
        self._stages = {key: self._stages[key] for key in newest}
        try:
            for part in self.parts[-2:]:  # the one before too, if a crash or a full disk left it as it was
                compress(self.path.with_name(part))
        except OSError:
            return  # larger than it need be; tried again with the next part

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
        # Written to last is at the end.
        self._stages[record.decision_id] = {*self._stages.pop(record.decision_id, ()), record.stage}
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
    """Records of a ledger, closed parts beside it included, oldest first; a torn last line is left out.

    Raises:
        LedgerError: a whole line cannot be read; the line is named.
    """
    for place, number, line in ledger_lines(path):
        yield parse_record(place, number, line)


def read_newest(path: Path, count: int) -> tuple[LedgerRecord, ...]:
    """The newest ``count`` records, oldest first; only they are parsed.

    Raises:
        LedgerError: one of them cannot be read.
    """
    newest = newest_lines(path, count) if count > 0 else []
    return tuple(parse_record(place, number, line) for place, number, line in newest)


def read_balance(path: Path) -> Balance:
    """The balance of the whole ledger, which the growing file knows.

    Raises:
        LedgerError: a line cannot be read.
    """
    with growing(path) as newest:
        balance = Balance() if newest.carried is None else _carried(path.name, newest.carried).balance
        for place, number, line in newest.lines:
            balance = balance.add(parse_record(place, number, line, inputs=False))
    return balance


def _carried(place: str, plain: dict[str, Any]) -> Carried:
    try:
        carried: Carried = from_plain(Carried, plain, ignore_unknown=True)
    except ValueError as error:
        raise LedgerError(f"{place}:1: unreadable summary of what was before: {error}") from error
    return carried

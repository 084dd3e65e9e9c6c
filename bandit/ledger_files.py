"""The ledger's files: one that grows, and what was before it, compressed.

    ledger.jsonl             grows; its first line carries what the index needs of what was before, and its files' names
    ledger-000001.jsonl.gz   the oldest part, then 000002, ...

A part that was closed is never written again, so it may be copied away or deleted; readers then begin later. A reader
opens the growing file first and goes by the names in it, so it sees no line twice and misses none.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from specblock.bandit.errors import LedgerError

CARRIED = "carried"
_NEW, _PARTIAL = ".new", ".partial"

Line = tuple[str, int, bytes]
"""File name, line number, the line."""


@dataclass(frozen=True, slots=True)
class Growing:
    """The growing file, opened: what its first line carries (None: it is the first file), and its records."""

    carried: dict[str, Any] | None
    lines: Iterator[Line]


def next_part(path: Path) -> str:
    """Name of the part that ``path`` becomes when it is closed; behind all that are there, whoever put them there."""
    taken = re.compile(re.escape(path.stem) + r"-(\d{6,})" + re.escape(path.suffix) + r"(\.gz)?")
    found = [int(match.group(1)) for other in path.parent.iterdir() if (match := taken.fullmatch(other.name))]
    return f"{path.stem}-{max(found, default=0) + 1:06d}{path.suffix}"


def clean_up(path: Path) -> None:
    """Removes what a crash amid ``roll`` left: a file that was not used yet, a second name of the growing one."""
    path.with_name(path.name + _NEW).unlink(missing_ok=True)
    if not path.exists():
        return
    for other in path.parent.glob(f"{path.stem}-*{path.suffix}"):
        if other.samefile(path):
            other.unlink()


def roll(path: Path, part: str, carried: bytes) -> FileIO:
    """Closes the growing file as ``part`` and begins a new one with the line ``carried``.

    There is a whole file under ``path`` at every moment, and whatever crashes when, every line is in exactly one place
    that readers look at.

    Returns:
        The new file, open for appending.

    Raises:
        OSError: the disk refused; the ledger is as it was.
    """
    new = path.with_name(path.name + _NEW)
    new.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)  # now: after the change nothing may fail any more
    try:
        file = new.open("ab", buffering=0)
        try:
            if file.write(carried) != len(carried):
                raise OSError("the first line was written in part only")
            os.fsync(file.fileno())
            os.link(path, path.with_name(part))
            new.replace(path)
        except OSError:
            file.close()
            clean_up(path)
            raise
        with suppress(OSError):  # a lost name comes back as the file before, whole
            os.fsync(directory)
        return file
    finally:
        os.close(directory)


def compress(closed: Path) -> None:
    """Compresses a closed part; one that is compressed or gone is left alone.

    Raises:
        OSError: the disk refused; the part is as it was.
    """
    if not closed.exists():
        return
    partial = closed.with_name(closed.name + _PARTIAL)
    with closed.open("rb") as plain, partial.open("wb") as raw:
        with gzip.GzipFile(filename="", mode="wb", compresslevel=4, fileobj=raw, mtime=0) as packed:
            shutil.copyfileobj(plain, packed, 1 << 20)
        raw.flush()
        os.fsync(raw.fileno())
    partial.rename(closed.with_name(closed.name + ".gz"))
    sync_directory(closed.parent)
    closed.unlink()


@contextmanager
def growing(path: Path) -> Iterator[Growing]:
    """The growing file for reading; a torn last line is left out.

    Raises:
        LedgerError: its first line cannot be read.
    """
    with path.open("rb") as file:
        first = file.readline()
        carried = carried_of(path.name, first)
        begin = iter(()) if carried is not None or not first.endswith(b"\n") else iter([(path.name, 1, first)])
        yield Growing(carried, _chained(begin, ((path.name, n, line) for n, line in enumerate(file, start=2))))


def ledger_lines(path: Path) -> Iterator[Line]:
    """Every record of all files, oldest first.

    Raises:
        LedgerError: a file cannot be read.
    """
    with growing(path) as newest:
        for part in parts_of(newest):
            yield from _part_lines(path.with_name(part))
        yield from newest.lines


def newest_lines(path: Path, count: int) -> list[Line]:
    """The newest ``count`` records, oldest first; older files are opened only where they are needed.

    Raises:
        LedgerError: a file that is needed cannot be read.
    """
    with growing(path) as newest:
        found = list(deque(newest.lines, maxlen=count))
        for part in reversed(parts_of(newest)):
            if len(found) == count:
                break
            found = [*deque(_part_lines(path.with_name(part)), maxlen=count - len(found)), *found]
    return found


def parts_of(newest: Growing) -> tuple[str, ...]:
    """Names of the closed parts, oldest first."""
    return tuple(newest.carried["parts"]) if newest.carried else ()


def carried_of(place: str, line: bytes) -> dict[str, Any] | None:
    """What a first line carries; None if it is a record like any other.

    Raises:
        LedgerError: it cannot be read.
    """
    if not line.startswith(b'{"' + CARRIED.encode() + b'":') or not line.endswith(b"\n"):
        return None
    try:
        carried: dict[str, Any] = json.loads(line)[CARRIED]
        if not all(isinstance(part, str) for part in carried["parts"]):
            raise ValueError("parts are not names")
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{place}:1: unreadable summary of what was before: {error}") from error
    return carried


def _chained(first: Iterator[Line], rest: Iterator[Line]) -> Iterator[Line]:
    yield from first
    for place, number, line in rest:
        if not line.endswith(b"\n"):
            return
        yield place, number, line


def _part_lines(closed: Path) -> Iterator[Line]:
    """Lines of one closed part, compressed or not yet; none if it was taken away."""
    packed = closed.with_name(closed.name + ".gz")
    # While it is being compressed it is under one name and then under the other.
    for place, opener in ((packed, gzip.open), (closed, open), (packed, gzip.open)):
        try:
            with opener(place, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if number > 1 or carried_of(place.name, line) is None:
                        yield place.name, number, line
            return
        except FileNotFoundError:
            continue
        except (EOFError, OSError, zlib.error) as error:
            raise LedgerError(f"{place.name}: cannot be read: {error}") from error


def sync_directory(directory: Path) -> None:
    """Makes a new name in ``directory`` durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

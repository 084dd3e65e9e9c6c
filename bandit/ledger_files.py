"""The ledger's files: one that grows, and what was before it, compressed.

    ledger.jsonl             grows; its first line carries what the index needs of everything before
    ledger-000001.jsonl.gz   the oldest part, then 000002, ...

A part that was closed is never written again, so it may be copied away or deleted; readers then begin later. The first
line says how many parts come before, so a reader that opened the growing file sees no line twice and misses none.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

CARRIED = "carried"
_NEW, _PARTIAL = ".new", ".partial"


def part_path(path: Path, number: int) -> Path:
    """Where part ``number`` (from 1) is, compressed."""
    return path.with_name(f"{path.stem}-{number:06d}{path.suffix}.gz")


def finish_roll(path: Path) -> None:
    """Ends a change of files that a crash interrupted."""
    new = path.with_name(path.name + _NEW)
    if new.exists() and not path.exists():
        new.rename(path)
        sync_directory(path.parent)
    new.unlink(missing_ok=True)


def roll(path: Path, number: int, carried: bytes) -> None:
    """Closes the growing file as part ``number`` and begins a new one with the line ``carried``.

    Whatever crashes when, every line is in exactly one place that readers look at.

    Raises:
        OSError: the disk refused; the ledger is as it was, or goes on in its new file.
    """
    new, closed = path.with_name(path.name + _NEW), part_path(path, number).with_suffix("")
    with new.open("wb") as file:
        file.write(carried)
        file.flush()
        os.fsync(file.fileno())
    path.rename(closed)
    new.rename(path)
    sync_directory(path.parent)
    compress_parts(path)


def compress_parts(path: Path) -> None:
    """Compresses closed parts that are not yet."""
    for closed in path.parent.glob(f"{path.stem}-[0-9]*{path.suffix}"):
        partial = closed.with_name(closed.name + _PARTIAL)
        with closed.open("rb") as plain, partial.open("wb") as raw:
            with gzip.GzipFile(filename="", mode="wb", compresslevel=4, fileobj=raw, mtime=0) as packed:
                shutil.copyfileobj(plain, packed, 1 << 20)
            raw.flush()
            os.fsync(raw.fileno())
        partial.rename(closed.with_name(closed.name + ".gz"))
        sync_directory(path.parent)
        closed.unlink()


def carried_of(line: bytes) -> dict[str, object] | None:
    """What a first line carries; None if it is a record like any other."""
    if not line.startswith(b'{"' + CARRIED.encode() + b'":'):
        return None
    plain = json.loads(line)
    found = plain[CARRIED] if isinstance(plain, dict) else None
    return found if isinstance(found, dict) else None


def ledger_lines(path: Path, *, parts: bool = True) -> Iterator[tuple[str, int, bytes]]:
    """(file name, line number, line) of every whole record, oldest first; a torn last line is left out.

    Without ``parts`` only those of the growing file.
    """
    with path.open("rb") as growing:
        first = growing.readline()
        carried = carried_of(first) if first.endswith(b"\n") else None
        before = carried.get("parts", 0) if carried and parts else 0
        for number in range(1, (before if isinstance(before, int) else 0) + 1):
            yield from _part_lines(part_path(path, number))
        if carried is None and first.endswith(b"\n"):
            yield path.name, 1, first
        for number, line in enumerate(growing, start=2):
            if not line.endswith(b"\n"):
                return
            yield path.name, number, line


def _part_lines(packed: Path) -> Iterator[tuple[str, int, bytes]]:
    """Lines of one closed part, compressed or not yet; none if it was taken away."""
    for place, open_file in ((packed, gzip.open), (packed.with_suffix(""), open), (packed, gzip.open)):
        try:
            with open_file(place, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if not line.endswith(b"\n"):
                        return
                    if number > 1 or carried_of(line) is None:
                        yield place.name, number, line
            return
        except FileNotFoundError:
            continue  # it is being compressed: look under its other name, and then once more


def sync_directory(directory: Path) -> None:
    """Makes a new name in ``directory`` durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

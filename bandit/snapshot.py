"""Snapshots on disk: write, fsync, rename, fsync the folder; checksummed; the newest whole one is used."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from specblock.bandit.errors import SnapshotError

MAGIC = "specblock-bandit-snapshot-1"


@dataclass(frozen=True, slots=True)
class LoadedSnapshot:
    """The newest whole snapshot, and why newer ones were refused."""

    text: str
    path: Path
    refused: tuple[str, ...]


class SnapshotStore:
    """Numbered snapshots in one folder; the last ``keep`` stay.

    Args:
        directory: created if missing.
        keep: at least 2, so that a torn newest one leaves its predecessor.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self._directory = directory
        self._keep = keep
        directory.mkdir(parents=True, exist_ok=True)
        self._next = max((_number(path) for path in self._paths()), default=0) + 1

    def save(self, text: str) -> Path:
        """Makes ``text`` the newest snapshot; it survives a power cut once this returns.

        Raises:
            OSError: the disk is full or gone; older snapshots are untouched.
        """
        path = self._directory / f"state-{self._next:09d}.snap"
        temporary = path.with_suffix(".tmp")
        body = text.encode()
        with temporary.open("wb") as file:
            file.write(f"{MAGIC} {hashlib.sha256(body).hexdigest()}\n".encode() + body)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        _sync_directory(self._directory)
        self._next += 1
        for old in self._paths()[: -self._keep]:
            old.unlink(missing_ok=True)
        return path

    def load(self) -> LoadedSnapshot | None:
        """The newest whole snapshot; None when none was ever written.

        Raises:
            SnapshotError: there are snapshots and every one is damaged.
        """
        refused: list[str] = []
        for path in reversed(self._paths()):
            try:
                return LoadedSnapshot(_read(path), path, tuple(refused))
            except SnapshotError as error:
                refused.append(str(error))
        if refused:
            raise SnapshotError("no snapshot is whole: " + "; ".join(refused))
        return None

    def _paths(self) -> list[Path]:
        return sorted(self._directory.glob("state-*.snap"))


def _number(path: Path) -> int:
    digits = path.stem.removeprefix("state-")
    return int(digits) if digits.isdigit() else 0


def _read(path: Path) -> str:
    head, _, body = path.read_bytes().partition(b"\n")
    magic, _, checksum = head.decode("ascii", errors="replace").partition(" ")
    if magic != MAGIC:
        raise SnapshotError(f"{path.name}: not a snapshot of this version")
    if hashlib.sha256(body).hexdigest() != checksum:
        raise SnapshotError(f"{path.name}: checksum does not match, the file is torn or altered")
    return body.decode()


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""``daemon.json`` in the state directory: where the running daemon answers, for the other commands."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from specblock.daemon.errors import DependencyError

RUN_FILE = "daemon.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonInfo:
    """A running daemon: its process id, the base URL of its endpoint and its start (seconds since the epoch)."""

    pid: int
    url: str
    version: str
    started_at_unix_s: float


def write_run_file(state_dir: Path, info: DaemonInfo) -> None:
    """Replaces the run file in one step; readers see the old or the new one."""
    temporary = state_dir / f"{RUN_FILE}.tmp"
    temporary.write_text(json.dumps(asdict(info)) + "\n", encoding="utf-8")
    temporary.replace(state_dir / RUN_FILE)


def remove_run_file(state_dir: Path) -> None:
    """Called on a clean stop."""
    (state_dir / RUN_FILE).unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    """True if a process of this id exists (it may belong to another user)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_run_file(state_dir: Path) -> DaemonInfo:
    """Finds the running daemon.

    Raises:
        DependencyError: there is none, or it died without removing its file.
    """
    path = state_dir / RUN_FILE
    try:
        info = DaemonInfo(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DependencyError(f"no daemon is running: {path} does not exist") from None
    except (OSError, ValueError, TypeError) as error:
        raise DependencyError(f"{path} cannot be read: {error}") from None
    if not is_running(info.pid):
        raise DependencyError(f"no daemon is running: process {info.pid} of {path} is gone")
    return info

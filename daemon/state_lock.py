"""One daemon per state directory: the directory is made, tried and locked before anything in it is touched."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from specblock.daemon.errors import ConfigError, DependencyError

LOCK_FILE = "lock"


@contextmanager
def own_state_dir(state_dir: Path) -> Iterator[None]:
    """Keeps other daemons out of ``state_dir`` while the body runs; a killed owner's lock is released by the system.

    Raises:
        ConfigError: the directory cannot be made or written.
        DependencyError: another daemon has it.
    """
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(state_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"state_dir: {state_dir} cannot be used: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            raise DependencyError(f"state_dir: {state_dir} is used by another daemon (process {owner})") from None
        except OSError as error:
            raise ConfigError(f"state_dir: {state_dir} cannot be locked: {error.strerror}") from None
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        except OSError as error:  # a full disk
            raise ConfigError(f"state_dir: {state_dir} cannot be written: {error.strerror}") from None
        yield
    finally:
        os.close(descriptor)

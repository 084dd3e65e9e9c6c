"""What can go wrong in the daemon, and the exit code each kind ends the process with.

SpecblockError
├── ConfigError          2  the policy file or the command line
├── DependencyError      3  Redis, Ray, a port or a running daemon cannot be reached
├── DeviceError          4  no such device, or not enough memory on it
├── IncompatibleError    5  target and drafter (or a stored version) do not fit together
│   └── CorruptVersionError
├── FailedCheckError        several of the above at once, found before the start
└── VerificationError    6  a check of the running system failed
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of ``specblockd``; scripts rely on them."""

    OK = 0
    CONFIG = 2
    DEPENDENCY = 3
    DEVICE = 4
    INCOMPATIBLE = 5
    VERIFICATION = 6


class SpecblockError(Exception):
    """Base of every error the daemon reports to a person; ``exit_code`` ends the process."""

    exit_code = ExitCode.DEPENDENCY


class ConfigError(SpecblockError, ValueError):
    """Everything that is wrong with a configuration, one line per problem."""

    exit_code = ExitCode.CONFIG

    def __init__(self, lines: Sequence[str] | str) -> None:
        self.lines: tuple[str, ...] = (lines,) if isinstance(lines, str) else tuple(lines)
        super().__init__("\n".join(self.lines))


class DependencyError(SpecblockError):
    """A process, port or service that the daemon needs is missing or does not answer."""


class DeviceError(SpecblockError):
    """The configured device is missing or has too little memory."""

    exit_code = ExitCode.DEVICE


class IncompatibleError(SpecblockError):
    """Target and drafter, or a stored drafter version, do not fit together."""

    exit_code = ExitCode.INCOMPATIBLE


class CorruptVersionError(IncompatibleError):
    """A stored drafter version is torn or damaged; the message names the file."""


class FailedCheckError(SpecblockError):
    """What ``specblockd check`` reports, one line per error; ends the process as the first of them would."""

    def __init__(self, lines: Sequence[str], exit_code: ExitCode) -> None:
        super().__init__("\n".join(lines))
        self.exit_code = exit_code


class VerificationError(SpecblockError):
    """A check of the running system (losslessness, parity, stored checksums) failed."""

    exit_code = ExitCode.VERIFICATION

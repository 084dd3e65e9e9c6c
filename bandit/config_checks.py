"""Checks that every configuration of this package shares: each names the value it refuses by its dotted path."""

from __future__ import annotations

import math


def require(ok: bool, path: str, rule: str, value: object) -> None:
    """Refuse ``value`` unless ``ok``.

    Raises:
        ValueError: "<path> must be <rule>, got <value>".
    """
    if not ok:
        raise ValueError(f"{path} must be {rule}, got {value!r}")


def positive(path: str, **values: float) -> None:
    """Finite numbers above 0."""
    for name, value in values.items():
        require(math.isfinite(value) and value > 0, f"{path}.{name}", "a finite number above 0", value)


def not_negative(path: str, **values: float) -> None:
    """Finite numbers of at least 0."""
    for name, value in values.items():
        require(math.isfinite(value) and value >= 0, f"{path}.{name}", "a finite number of at least 0", value)


def fraction(path: str, **values: float) -> None:
    """Numbers strictly between 0 and 1."""
    for name, value in values.items():
        require(0 < value < 1, f"{path}.{name}", "strictly between 0 and 1", value)


def at_least(path: str, minimum: float, **values: float) -> None:
    """Finite numbers that may not be below ``minimum``."""
    for name, value in values.items():
        require(math.isfinite(value) and value >= minimum, f"{path}.{name}", f"at least {minimum}", value)

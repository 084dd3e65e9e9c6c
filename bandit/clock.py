"""Pacing by a wall clock, which may be set back."""

from __future__ import annotations


def is_due(now_s: float, last_s: float, every_s: float) -> bool:
    """Whether ``every_s`` have passed; a ``last_s`` in the future says that the clock was set back, so it is."""
    return not 0 <= now_s - last_s < every_s

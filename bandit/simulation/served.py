"""What every policy of a comparison sees of its world: the actions, and what was served so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from specblock.bandit.actions import Actions
from specblock.bandit.events import AcceptanceEvent


class ServedWorld(Actions, Protocol):
    """A world that serves traffic in simulated time; actions take that time while the old version goes on serving.

    Attributes:
        now_s: simulated time.
        free_s: when the action under way ends.
        served: requests served so far, numbered from 0.
        serving_s, charged_s: device-seconds of serving, and those charged for everything else.
        trainings, updates, rollbacks: begun, put live, taken back.
        on_request: told the number of every request as it is served.
    """

    now_s: float
    free_s: float
    served: int
    serving_s: float
    charged_s: float
    trainings: int
    updates: int
    rollbacks: int
    on_request: Callable[[int], None]

    @property
    def tokens(self) -> int:
        """Tokens committed so far; the same for every policy."""

    @property
    def end_s(self) -> float:
        """When the traffic ends."""

    def serve_until(self, now_s: float) -> None:
        """Serve everything that arrives before ``now_s`` with the version that serves now."""

    def acceptance(self, number: int) -> float:
        """Acceptance length of a request that was served."""

    def event(self, number: int) -> AcceptanceEvent:
        """What an engine would have reported of it."""

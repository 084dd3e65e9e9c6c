"""One policy through one run of traffic, and what came out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from specblock.bandit.simulation.scenario import START_S
from specblock.bandit.simulation.served import ServedWorld


class Driver(Protocol):
    """A policy at work in a world."""

    def step(self, now_s: float) -> None:
        """Look, and perhaps act. Never called while an earlier action still takes time."""

    def close(self) -> None:
        """The run is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one policy made of one run; device-seconds, all modelled.

    Attributes:
        tokens: committed; the same for every policy.
        serving_s: device-seconds of serving.
        charged_s: device-seconds charged for training, scoring, interference and stalls.
        updates: versions that went live.
        trainings: updates begun, those that never served included.
        rollbacks: versions taken back.
        faults: decisions that reported a fault; None for policies that cannot.
        surprises: see ``calibration.surprises``; empty for policies that predict nothing.
    """

    scenario: str
    policy: str
    seed: int
    tokens: int
    serving_s: float
    charged_s: float
    updates: int
    trainings: int
    rollbacks: int
    faults: int | None = None
    surprises: tuple[float, ...] = ()

    @property
    def total_s(self) -> float:
        """Serving and everything charged."""
        return self.serving_s + self.charged_s

    @property
    def net_tokens_per_s(self) -> float:
        """Tokens per device-second, every cost charged."""
        return self.tokens / self.total_s if self.total_s > 0 else 0.0

    @property
    def gross_tokens_per_s(self) -> float:
        """Tokens per device-second of serving."""
        return self.tokens / self.serving_s if self.serving_s > 0 else 0.0


def drive(world: ServedWorld, driver: Driver, tick_s: float) -> None:
    """Serve the whole traffic and let ``driver`` look at the world every ``tick_s``, when it is not busy acting."""
    now_s = START_S
    while now_s < world.end_s:
        now_s = min(max(now_s + tick_s, world.free_s), world.end_s)
        world.serve_until(now_s)
        if now_s < world.end_s:
            driver.step(now_s)
    driver.close()

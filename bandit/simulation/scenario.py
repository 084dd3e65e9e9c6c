"""Traffic that drifts: when which kind of text arrives, under which name, and whether something breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specblock.bandit.simulation.curves import Curves

START_S = 1_000_000.0
"""When simulated time begins, Unix seconds: 0 means "never" to the bandit."""

BURST_S, BETWEEN_BURSTS_S = 300.0, 1500.0

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Share = Callable[[Floats], Floats]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A story about traffic.

    Attributes:
        tagged: requests name their kind of text; otherwise all carry one name and the mix drifts beneath it.
        fault_at: share of the duration after which live acceptance is broken; above 1: never.
    """

    name: str
    about: str
    tagged: bool = True
    fault_at: float = 2.0


SCENARIOS = (
    Scenario(name="abrupt", about="one kind of text, then only another, from a sixth of the time on"),
    Scenario(
        name="slow", about="one kind turns into another over two thirds of the time, under one name", tagged=False
    ),
    Scenario(name="recurring", about="two kinds take turns, six times"),
    Scenario(name="bursty", about="five minutes of another kind, at random, after 25 minutes on average"),
    Scenario(name="stationary", about="one kind of text, which the drafter knows"),
    Scenario(name="fault", about="the same, and a cache breaks after a third of the time", fault_at=1 / 3),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Every request of a run, in the order of arrival; the same for all policies.

    Attributes:
        kinds: kinds of text.
        domains: names that requests carry.
        time_s: arrival.
        kind: index into ``kinds``.
        domain: index into ``domains``.
        heldout: kept out of training.
        scatter: standard normal; how hard the conversation is for the base drafter.
        dither: uniform in [0, 1); rounds cycles to whole numbers without bias.
        fault_s: when live acceptance breaks.
        end_s: end of the run.
    """

    kinds: tuple[str, ...]
    domains: tuple[str, ...]
    time_s: Floats
    kind: Ints
    domain: Ints
    heldout: NDArray[np.bool_]
    scatter: Floats
    dither: Floats
    fault_s: float
    end_s: float


def scenario_named(name: str) -> Scenario:
    """The scenario of that name.

    Raises:
        ValueError: there is none.
    """
    for scenario in SCENARIOS:
        if scenario.name == name:
            return scenario
    raise ValueError(f"no scenario is called {name!r}; there are {', '.join(s.name for s in SCENARIOS)}")


def make_traffic(scenario: Scenario, curves: Curves, seed: int, duration_s: float, rate_per_s: float) -> Traffic:
    """Poisson arrivals of a scenario's mix of the usual and the new kind of text.

    Args:
        scenario: what happens.
        curves: names the kinds of text.
        seed: of arrivals, kinds and conversations.
        duration_s: simulated seconds.
        rate_per_s: requests per second.
    """
    random = np.random.default_rng([seed, _number(scenario)])
    count = int(random.poisson(rate_per_s * duration_s))
    passed_N = np.sort(random.uniform(0.0, duration_s, count))
    share_N = _share(scenario, duration_s, random)(passed_N)
    kind_N = (random.uniform(size=count) < share_N).astype(np.int64)
    kinds = (curves.usual, curves.new)
    return Traffic(
        kinds=kinds,
        domains=kinds if scenario.tagged else ("default",),
        time_s=START_S + passed_N,
        kind=kind_N,
        domain=kind_N if scenario.tagged else np.zeros_like(kind_N),
        heldout=random.uniform(size=count) < curves.heldout_fraction,
        scatter=random.standard_normal(count),
        dither=random.uniform(size=count),
        fault_s=START_S + scenario.fault_at * duration_s,
        end_s=START_S + duration_s,
    )


def _number(scenario: Scenario) -> int:
    """A seed of its own for every scenario that does not depend on the order of the list."""
    return int.from_bytes(scenario.name.encode()[:8], "big")


def _share(scenario: Scenario, duration_s: float, random: np.random.Generator) -> Share:
    """Share of the second kind of text over the seconds since the start."""
    if scenario.name == "abrupt":
        return lambda passed: (passed >= duration_s / 6).astype(np.float64)
    if scenario.name == "slow":
        return lambda passed: np.clip((passed / duration_s - 1 / 6) / (4 / 6), 0.0, 1.0)
    if scenario.name == "recurring":
        return lambda passed: (np.floor(6 * passed / duration_s) % 2).astype(np.float64)
    if scenario.name == "bursty":
        return _bursts(duration_s, random)
    return np.zeros_like


def _bursts(duration_s: float, random: np.random.Generator) -> Share:
    gaps = random.exponential(BETWEEN_BURSTS_S, size=int(duration_s / BURST_S) + 2)
    starts = np.cumsum(gaps) + BURST_S * np.arange(len(gaps))

    def share(passed: Floats) -> Floats:
        newest = np.searchsorted(starts, passed, side="right") - 1
        since = passed - starts[np.maximum(newest, 0)]
        return ((newest >= 0) & (since < BURST_S)).astype(np.float64)

    return share

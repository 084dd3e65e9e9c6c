"""Traffic for ``bench shift``: when a request of which kind of text arrives, and which recorded conversation it is.

Legend: N requests in the order of arrival.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specblock.bandit.simulation.scenario import START_S

NEVER_S = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePlan:
    """One kind of text after the other.

    Attributes:
        domains: of the phases.
        phase_s: length of each.
        requests_per_s: Poisson arrivals.
        heldout_fraction: share of requests whose conversation is kept out of training.
        fault_at: share of the whole time after which the drafter's cache slips; above 1: never.
        seed: of arrivals and draws.
    """

    domains: tuple[str, ...]
    phase_s: float
    requests_per_s: float
    heldout_fraction: float
    fault_at: float = 2.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftTraffic:
    """Every request of a run; the same for all policies.

    What is served is always a conversation of the first half of the held-out ones; what a policy keeps, to train on or
    to judge by, are others of the same kind. So none is paid for knowing its training text by heart, nor for having
    picked the candidate that happens to suit the text that is counted.

    Attributes:
        domains: kinds of text.
        time_s: arrival [N].
        phase: number of the phase [N].
        domain: index into ``domains`` [N].
        served: held-out conversation of that domain that is served and counted [N].
        kept: conversation of that domain that is kept [N]; below 0: the held-out one numbered ``-1 - kept``.
        num_served: held-out conversations that may be served, by domain.
        fault_s: when the drafter's cache slips.
        end_s: end of the run.
    """

    domains: tuple[str, ...]
    time_s: NDArray[np.float64]
    phase: NDArray[np.int64]
    domain: NDArray[np.int64]
    served: NDArray[np.int64]
    kept: NDArray[np.int64]
    num_served: tuple[int, ...]
    fault_s: float
    end_s: float


def make_shift(plan: PhasePlan, num_heldout: Mapping[str, int], num_train: Mapping[str, int]) -> ShiftTraffic:
    """Poisson arrivals; conversations are drawn from those recorded, with replacement.

    Args:
        plan: phases and rates.
        num_heldout: recorded held-out conversations by domain, at least 2 each.
        num_train: recorded training conversations by domain, at least 1 each.
    """
    random = np.random.default_rng([plan.seed, len(plan.domains)])
    duration_s = plan.phase_s * len(plan.domains)
    count = int(random.poisson(plan.requests_per_s * duration_s))
    passed_N = np.sort(random.uniform(0.0, duration_s, count))
    phase_N = np.minimum((passed_N / plan.phase_s).astype(np.int64), len(plan.domains) - 1)
    domains = tuple(dict.fromkeys(plan.domains))
    domain_N = np.array([domains.index(name) for name in plan.domains], dtype=np.int64)[phase_N]
    trained_N = random.uniform(size=count) >= plan.heldout_fraction
    first = {name: num_heldout[name] // 2 for name in domains}
    first_N = np.array([first[name] for name in domains], dtype=np.int64)[domain_N]
    judged_N = _drawn(random, domain_N, domains, {name: num_heldout[name] - first[name] for name in domains})
    return ShiftTraffic(
        domains=domains,
        time_s=START_S + passed_N,
        phase=phase_N,
        domain=domain_N,
        served=_drawn(random, domain_N, domains, first),
        kept=np.where(trained_N, _drawn(random, domain_N, domains, num_train), -1 - first_N - judged_N),
        num_served=tuple(first[name] for name in domains),
        fault_s=START_S + plan.fault_at * duration_s if plan.fault_at <= 1 else NEVER_S,
        end_s=START_S + duration_s,
    )


def _drawn(
    random: np.random.Generator, domain_N: NDArray[np.int64], domains: Sequence[str], counts: Mapping[str, int]
) -> NDArray[np.int64]:
    most_N = np.array([counts[name] for name in domains], dtype=np.int64)[domain_N]
    return (random.uniform(size=len(domain_N)) * most_N).astype(np.int64)

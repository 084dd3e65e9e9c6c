"""Measured gain of one version over another from paired replays of the same conversations. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from specblock.bandit.actions import PairedReplay


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainGain:
    """Relative saving of device-seconds per token in one domain, with its standard error over conversations."""

    domain: str
    conversations: int
    gain: float
    se: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredGain:
    """Saving over all traffic: domain gains weighted by share; unmeasured domains count as gain 0, error 0."""

    mean: float
    se: float
    conversations: int
    domains: tuple[DomainGain, ...]


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float]:
    """Pooled ratio sum/sum and its standard error by linearisation (inf for fewer than two pairs)."""
    n, below = len(numerators), math.fsum(denominators)
    pooled = math.fsum(numerators) / below
    if n < 2:
        return pooled, math.inf
    squares = math.fsum((a - pooled * b) ** 2 for a, b in zip(numerators, denominators, strict=True))
    return pooled, math.sqrt(n / (n - 1) * squares) / below


def measure(
    rows: Sequence[PairedReplay], cycle_s_old: float, cycle_s_new: float, shares: Mapping[str, float]
) -> MeasuredGain | None:
    """Gain of the new version; None when no domain has two conversations.

    Args:
        rows: paired replays; those without cycles are left out.
        cycle_s_old: seconds per cycle with the old version.
        cycle_s_new: seconds per cycle with the new version.
        shares: share of serving seconds per domain.
    """
    by_domain: dict[str, list[PairedReplay]] = {}
    for row in rows:
        if row.cycles_old > 0 and row.cycles_new > 0:
            by_domain.setdefault(row.domain, []).append(row)
    found = []
    for domain in sorted(by_domain):
        paired = by_domain[domain]
        pooled, se = ratio([float(r.cycles_new) for r in paired], [float(r.cycles_old) for r in paired])
        if len(paired) >= 2:
            slower = cycle_s_new / cycle_s_old
            found.append(DomainGain(domain=domain, conversations=len(paired), gain=1 - pooled * slower, se=se * slower))
    if not found:
        return None
    return MeasuredGain(
        mean=math.fsum(shares.get(d.domain, 0.0) * d.gain for d in found),
        se=math.sqrt(math.fsum((shares.get(d.domain, 0.0) * d.se) ** 2 for d in found)),
        conversations=sum(d.conversations for d in found),
        domains=tuple(found),
    )

"""How far acceptance has fallen below its reference, and in how much of the text. Pure reads of statistics.

The newest requests alone say little: decisions are taken every few seconds, and the largest of many noisy drops looks
like one that an update would repair. What came before says the same as long as nothing changed, so requests are pooled
as far back as they agree with the newer ones (after Lepski: the longest window that contradicts no shorter one). A
sudden change leaves the newest requests alone, a slow drift as many as hardly differ.

Text of a new kind that is the part ``f`` of all, and alone has dropped, gives beside the drop ``d`` of the whole a
scatter between the two kinds of ``d^2 (1 - f) / f``. What requests scatter beyond what they did at the reference tells
``f``. An update learns the less of the new text the smaller its part is. Kinds of text that scatter by
themselves by different amounts blur this; what an arm then gains is learned like everything else about it. A domain
whose reference is what others reach has nothing that fell: all of its text is new.

Source of the pooling: Lepski, On a problem of adaptive estimation in Gaussian white noise (Theory Prob. Appl. 1990).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from specblock.bandit.acceptance import Level, VersionStatistics
from specblock.bandit.intervals import RatioSums, agree

AGREE_Z = 3.0
"""Standard errors within which older requests agree with newer ones. What is newest is looked at hundreds of times a
day: within two, its most extreme moments would be taken for changes, and stand alone just then."""

PARTS_P = np.linspace(0.02, 1.0, 50)
"""Parts of the text that are weighed against each other, beforehand equally likely."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fall:
    """Acceptance beside its reference.

    Attributes:
        drop: ``1 - acceptance / reference``.
        se: its standard error.
        reference: of the strata, weighted with the newest cycles; 0 if no stratum has one.
        part: share of the text, about, that the drop comes from; 1 where nothing tells.
    """

    drop: float = 0.0
    se: float = 0.0
    reference: float = 0.0
    part: float = 1.0


def measured_fall(statistics: VersionStatistics, levels: Mapping[str, Level]) -> Fall:
    """Fall of the newest requests, and of older ones that agree with them, below the references of their strata.

    Strata without a reference are left out: nothing is known of them.
    """
    known = with_reference(levels)
    newest, cycles = RatioSums(), 0
    for segment in statistics.recent:
        if segment.stratum in known and segment.cycles > 0:
            level = known[segment.stratum]
            newest.add(segment.cycles * (level.tokens / level.cycles), segment.tokens)
            cycles += segment.cycles
    if not cycles:
        return Fall()
    reference, kept = newest.x / cycles, newest
    for block in reversed(statistics.older):
        older = against(block.strata, known)
        if not agree(older, kept, AGREE_Z):
            break
        kept = kept.plus(older)
    # The references were measured on a finite number of cycles with the same scatter per cycle.
    pooled, measured = kept.x / reference, sum(level.cycles for level in known.values())
    se = kept.se * math.sqrt(1 + pooled / measured)
    part = _part(kept, _at_reference(known.values()))
    return Fall(drop=1 - kept.ratio, se=min(se, 1.0), reference=reference, part=part)


def with_reference(levels: Mapping[str, Level]) -> dict[str, Level]:
    """The strata of which something is known."""
    return {stratum: level for stratum, level in levels.items() if level.cycles > 0}


def against(block: Mapping[str, RatioSums], known: Mapping[str, Level]) -> RatioSums:
    """Sums of (cycles, tokens) as sums of (tokens that the references promise, tokens)."""
    total = RatioSums()
    for stratum, sums in block.items():
        if stratum in known:
            total = total.plus(sums.scaled(known[stratum].tokens / known[stratum].cycles))
    return total


def _at_reference(levels: Iterable[Level]) -> RatioSums:
    """The same of the requests that the references were measured on."""
    total = RatioSums()
    for level in levels:
        total = total.plus(level.sums.scaled(level.tokens / level.cycles))
    return total


def _part(now: RatioSums, then: RatioSums) -> float:
    """Posterior mean of the part that a drop comes from, given what requests scatter now and did at the reference."""
    drop, scatter, usual = 1 - now.ratio, now.relative_variance, then.relative_variance
    if scatter is None or usual is None or drop <= 0:
        return 1.0
    # Of a normal variable, the variance is known to within sqrt(2 / n) of itself.
    se = math.hypot(scatter * math.sqrt(2 / now.units), usual * math.sqrt(2 / then.units))
    off_P = (drop**2 * (1 - PARTS_P) / PARTS_P - (scatter - usual)) / max(se, 1e-9)
    weight_P = np.exp(np.square(off_P).min() / 2 - np.square(off_P) / 2)
    return float((weight_P * PARTS_P).sum() / weight_P.sum())

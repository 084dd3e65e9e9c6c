"""How long a domain's traffic stays, goes away and comes back: what a gain in it will be worth. Pure plain numbers.

A domain is either there or away. With the rate ``m`` of going away and ``l`` of coming back, both gamma posteriors from
what was seen of this very domain, its expected presence after t seconds is

    p(t) = q + (p(0) - q) exp(-(l + m) t),    q = l / (l + m)

and its integral over the horizon is what a gain is multiplied with: a burst that ends after minutes is worth little,
one that keeps coming back is worth something, and text that has stayed for hours is believed to stay for longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from specblock.bandit.config import HorizonConfig

AWAY, BACK = 0.35, 0.65
"""Shares of its usual level below which a domain is away, and above which it is back: apart, or noise would count."""

FIRST_SHARE = 0.02
"""Share of traffic from which on a domain counts as there for the first time."""

MEMORY_S = 3600.0
"""How long the usual level of a domain is averaged over; what is left of one after as long is its usual level now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """Presence of one domain; lives in the snapshot, and in the context of every decision.

    Attributes:
        there: whether it is there now.
        level: its usual share of serving seconds while there.
        there_s: seconds it was there.
        away_s: seconds it was away, since it was first seen.
        ends: how often it went away.
        returns: how often it came back.
        turned_s: seconds since it came or went.
    """

    there: bool = False
    level: float = 0.0
    there_s: float = 0.0
    away_s: float = 0.0
    ends: int = 0
    returns: int = 0
    turned_s: float = 0.0

    def watched(self, share: float, passed_s: float) -> Presence:
        """With the domain's present share, which held for ``passed_s``."""
        if self.level == 0.0:
            first = share > FIRST_SHARE
            return replace(self, there=first, level=share if first else 0.0)
        if not self.there:
            back = share > BACK * self.level
            turned_s = 0.0 if back else self.turned_s + passed_s
            if not back and turned_s > MEMORY_S and share > FIRST_SHARE:
                return replace(self, there=True, level=share, away_s=self.away_s + passed_s, turned_s=turned_s)
            away_s, returns = self.away_s + passed_s, self.returns + back
            return replace(self, there=back, returns=returns, away_s=away_s, turned_s=turned_s)
        there_s = self.there_s + passed_s
        level = self.level + (share - self.level) * min(1.0, passed_s / min(max(there_s, passed_s), MEMORY_S))
        gone = share < AWAY * level
        turned_s = 0.0 if gone else self.turned_s + passed_s
        return replace(self, there=not gone, level=level, there_s=there_s, ends=self.ends + gone, turned_s=turned_s)

    def lasting_s(self, share: float, config: HorizonConfig) -> float:
        """Expected seconds of this domain's traffic within the horizon, in seconds of all traffic.

        Changes of acceptance inside a domain do not count: trial and gate measure the gain on its mix as it comes, and
        what was learned of a part that comes back pays again.

        Args:
            share: its share now.
            config: prior of both rates, discount and horizon.
        """
        prior, prior_s, going = config.hazard_prior_changes, config.hazard_prior_s, self._going_per_s(config)
        coming = (prior + self.returns) / (prior_s + self.away_s)
        stays = coming / (going + coming)
        always_s, fading_s = (_integral_s(rate, config) for rate in (0.0, going + coming))
        if self.there or self.level == 0.0:
            return share * (stays * always_s + (1 - stays) * fading_s)
        return self.level * stays * (always_s - fading_s)

    def staying_s(self, share: float, config: HorizonConfig) -> float:
        """The same until it goes away for the first time."""
        return share * _integral_s(self._going_per_s(config), config)

    def _going_per_s(self, config: HorizonConfig) -> float:
        return (config.hazard_prior_changes + self.ends) / (config.hazard_prior_s + self.there_s)


def _integral_s(rate_per_s: float, config: HorizonConfig) -> float:
    """Integral of exp(-(rate + discount) t) over the horizon."""
    rate = rate_per_s + config.discount_per_s
    return -math.expm1(-rate * config.cap_s) / rate if rate > 0 else config.cap_s

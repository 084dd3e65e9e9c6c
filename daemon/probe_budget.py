"""What probes of domains that do not speculate may lose."""

from __future__ import annotations


class ProbeBudget:
    """Lets probes lose at most a share of all device seconds, and not all of a long quiet time at once.

    Credit grows with every second of work and is capped at what two probes lose; a probe starts only when its expected
    loss is covered. A grant lets a probe start at once, on credit that later work pays back.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._credit_s = 0.0
        self._cap_s = 0.0
        self._grants = 0
        self.total_s = 0.0
        self.probe_s = 0.0
        self.lost_s = 0.0

    def grant(self, probes: int) -> None:
        """Allows the next ``probes`` probes whatever the credit is."""
        self._grants = probes

    def take(self, expected_s: float, kept_s: float = 0.0) -> bool:
        """Whether a probe that will lose so much may start now, if so much must be left for others."""
        self._cap_s = 2 * (expected_s + kept_s)
        if self._credit_s >= expected_s + kept_s:
            return True
        granted = self._grants > 0
        self._grants -= granted
        return granted

    def covers(self, expected_s: float) -> bool:
        """Whether a probe that will lose so much could start; working out what it will lose is worth it only then."""
        return self._grants > 0 or self._credit_s >= expected_s

    def spend(self, seconds: float) -> None:
        """Counts the device seconds of one cycle."""
        self.total_s += seconds
        self._credit_s += self._share * seconds
        # The cap forgets unused time; what a probe lost beyond its expectation stays owed.
        self._credit_s = min(self._credit_s, self._cap_s) if self._cap_s else self._credit_s

    def probed(self, seconds: float, lost_s: float) -> None:
        """Counts a probe's part of a cycle that ``spend`` has counted, and what it lost; what it won is below 0."""
        self.probe_s += seconds
        self.lost_s += lost_s
        self._credit_s -= lost_s

    @property
    def probe_share(self) -> float:
        """Seconds spent probing over all device seconds so far."""
        return self.probe_s / self.total_s if self.total_s else 0.0

    @property
    def lost_share(self) -> float:
        """Seconds that probes lost over all device seconds so far; below 0 if they won more."""
        return self.lost_s / self.total_s if self.total_s else 0.0

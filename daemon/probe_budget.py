"""What probes of a domain that does not speculate may lose."""

from __future__ import annotations


class ProbeBudget:
    """Lets probes of one domain lose at most a share of the device seconds that it is served in.

    Credit grows while the domain is off and is capped at what two probes lose, so that a long quiet time does not end
    in many of them; a probe starts only when its expected loss is covered. A grant lets one start at once, on credit
    that later work pays back. What one domain has saved, others cannot spend.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._credit_s = 0.0
        self._expected_s = 0.0
        self._granted = False

    def grant(self) -> None:
        """Allows the next probe whatever the credit is."""
        self._granted = True

    def is_near(self) -> bool:
        """Whether half of what a probe lost when last asked is covered: working out what it would now takes time."""
        return self._granted or self._credit_s >= 0.5 * self._expected_s

    def take(self, expected_s: float) -> bool:
        """Whether a probe that will lose so much may start now."""
        self._expected_s = expected_s
        if self._credit_s >= expected_s:
            return True
        granted, self._granted = self._granted, False
        return granted

    def earn(self, seconds: float) -> None:
        """Counts device seconds spent while the domain is off, or its part of them beside other such domains."""
        self._credit_s += self._share * seconds
        if self._expected_s:  # what a probe lost beyond its expectation stays owed
            self._credit_s = min(self._credit_s, 2 * self._expected_s)

    def lose(self, seconds: float) -> None:
        """Counts what a probe lost against plain decoding; what it won is below 0."""
        self._credit_s -= seconds

"""How much faster drafts make a kind of text, and how far that can be trusted.

The speed is a ratio of sums: tokens committed over tokens that plain decoding would have committed in the same seconds.
What varies is not cycles but passages: one request repeats itself and every draft is right, the next one suits the
drafter badly. Evidence is therefore kept by stretches of one request, and the doubt is what these differ by.

Source: the ratio estimator of cluster sampling (Cochran, Sampling Techniques, section 6.4).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from specblock.drafter.forgetting import ratio

STRETCH_CYCLES = 48


@dataclass(slots=True)
class _Stretch:
    request_id: str
    tokens: float = 0.0
    plain_cycles: float = 0.0
    absorbing: float = 0.0
    count: int = 0


class SpeedEvidence:
    """Stretches of requests, the newest ones.

    Args:
        window_cycles: cycles of one request that count at least; stretches beyond them are forgotten.
    """

    def __init__(self, window_cycles: int) -> None:
        self.window_cycles = window_cycles
        self._stretches: deque[_Stretch] = deque()
        self._open: dict[str, _Stretch] = {}
        self._tokens = self._plain_cycles = self._absorbing = self._pending = 0.0
        self.count = 0

    def __len__(self) -> int:
        """Stretches."""
        return len(self._stretches)

    def add(self, request_id: str, tokens: float, plain_cycles: float, absorbing: float = 0.0) -> None:
        """One cycle of one request.

        Args:
            request_id: whose.
            tokens: kept.
            plain_cycles: cycles that plain decoding would have made in its time.
            absorbing: the same of what drafting takes outside of cycles, if that is to be counted with this one.
        """
        stretch = self._open.get(request_id)
        if stretch is None:
            stretch = self._open[request_id] = _Stretch(request_id, absorbing=self._pending)
            self._stretches.append(stretch)
            self._pending = 0.0
        stretch.tokens += tokens
        stretch.plain_cycles += plain_cycles
        stretch.absorbing += absorbing
        stretch.count += 1
        if stretch.count >= STRETCH_CYCLES:
            del self._open[request_id]
        self._tokens += tokens
        self._plain_cycles += plain_cycles
        self._absorbing += absorbing
        self.count += 1
        while self.count - self._stretches[0].count >= self.window_cycles:
            self._forget(self._stretches.popleft())

    def absorbed(self, plain_cycles: float) -> None:
        """What a drafter took outside of cycles, such as absorbing the prompt of the request whose cycles come next.

        Args:
            plain_cycles: cycles that plain decoding would have made in that time.
        """
        self._pending += plain_cycles
        self._absorbing += plain_cycles

    def speed(self, prior: float = 0.0, prior_cycles: float = 0.0) -> float:
        """Tokens per cycle of plain decoding, absorbing included; the prior counts like so many of these cycles."""
        return ratio(self._tokens, self._plain_cycles + self._absorbing, prior, prior_cycles)

    def decoding(self, prior: float = 0.0, prior_cycles: float = 0.0) -> float:
        """The same without what was absorbed."""
        return ratio(self._tokens, self._plain_cycles, prior, prior_cycles)

    def doubt(self) -> float:
        """Standard deviation of the speed: what stretches differ by, at least that of a Poisson count of tokens."""
        total = self._plain_cycles + self._absorbing
        if total <= 0:
            return math.inf
        counted = math.sqrt(self._tokens) / total
        number = len(self._stretches)
        if number < 2:
            return counted
        speed = self._tokens / total
        squares = sum((s.tokens - speed * (s.plain_cycles + s.absorbing)) ** 2 for s in self._stretches)
        return max(counted, math.sqrt(squares * number / (number - 1)) / total)

    def lucky(self, deviations: float, prior: float, prior_cycles: float) -> float:
        """The speed had a Poisson count of tokens been smaller by chance, so many standard deviations."""
        tokens = self._tokens + deviations * math.sqrt(self._tokens)
        return ratio(tokens, self._plain_cycles + self._absorbing, prior, prior_cycles)

    def _forget(self, stretch: _Stretch) -> None:
        if self._open.get(stretch.request_id) is stretch:
            del self._open[stretch.request_id]
        self._tokens -= stretch.tokens
        self._plain_cycles -= stretch.plain_cycles
        self._absorbing -= stretch.absorbing
        self.count -= stretch.count

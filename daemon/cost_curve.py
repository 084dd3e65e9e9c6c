"""What a cycle costs: seconds of verification and drafting by size, measured at start-up and corrected while serving.

Time is taken to depend on the total number of rows of a forward (requests times rows each) plus a constant per further
request. Between measured points it is interpolated, beyond them extrapolated along the last slope.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specblock.drafter.forgetting import non_decreasing

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Timing:
    """One measured point: ``rows`` per request, ``batch`` requests, seconds of one forward."""

    rows: int
    batch: int
    seconds: float


@dataclass(frozen=True, slots=True)
class RowCurve:
    """Seconds of a forward, non-decreasing in rows and in requests.

    Attributes:
        total_rows: measured totals, ascending.
        seconds: at those totals, non-decreasing.
        per_request_s: added for every request after the first.
    """

    total_rows: tuple[int, ...]
    seconds: tuple[float, ...]
    per_request_s: float = 0.0

    def __post_init__(self) -> None:
        rows, seconds = self.total_rows, self.seconds
        if not rows or len(rows) != len(seconds) or list(rows) != sorted(set(rows)) or rows[0] < 1:
            raise ValueError("cost curve: total_rows must be distinct, ascending, at least 1, one per time")
        if list(seconds) != sorted(seconds) or seconds[0] <= 0 or self.per_request_s < 0:
            raise ValueError("cost curve: seconds must be above 0 and must not fall with rows")

    @classmethod
    def fit(cls, timings: Sequence[Timing]) -> RowCurve:
        """A monotone curve through measured points; the smallest batch measured gives its shape.

        Raises:
            ValueError: no points.
        """
        if not timings:
            raise ValueError("cost curve: nothing was measured")
        smallest = min(t.batch for t in timings)
        base = _monotone({t.rows * t.batch: t.seconds for t in timings if t.batch == smallest})
        others = [t for t in timings if t.batch != smallest]
        overlap = [
            (t.seconds - base.at(1, t.rows * t.batch)) / (t.batch - smallest)
            for t in others
            if t.rows * t.batch <= base.total_rows[-1]
        ]
        per_request_s = max(0.0, float(np.median(overlap))) if overlap else 0.0
        points = {
            rows: s - per_request_s * (smallest - 1) for rows, s in zip(base.total_rows, base.seconds, strict=True)
        }
        for t in others:
            if t.rows * t.batch > base.total_rows[-1]:
                points[t.rows * t.batch] = t.seconds - per_request_s * (t.batch - 1)
        curve = _monotone(points)
        return cls(curve.total_rows, curve.seconds, per_request_s)

    def at(self, rows: int, batch: int) -> float:
        """Seconds of a forward with ``rows`` rows for each of ``batch`` requests."""
        total, known, seconds = rows * batch, self.total_rows, self.seconds
        more_s = self.per_request_s * (batch - 1)
        if total >= known[-1]:
            return seconds[-1] + self._slope() * (total - known[-1]) + more_s
        above = bisect_right(known, total)
        if above == 0:
            return seconds[0] + more_s
        part = (total - known[above - 1]) / (known[above] - known[above - 1])
        return seconds[above - 1] + part * (seconds[above] - seconds[above - 1]) + more_s

    def table(self, rows: Floats, batch: int) -> Floats:
        """The same for many row counts at once, fractions allowed: [...] -> [...]."""
        total, last = rows * batch, self.total_rows[-1]
        beyond_s = self._slope() * np.maximum(total - last, 0.0)
        answer: Floats = np.interp(total, self.total_rows, self.seconds) + beyond_s + self.per_request_s * (batch - 1)
        return answer

    def _slope(self) -> float:
        """Seconds per row beyond the last point."""
        known, seconds = self.total_rows, self.seconds
        if len(known) == 1:
            return 0.0
        # The chord over the last factor of four, not the last two points: one noisy point must not tilt it. Nor may
        # noise that made the end look flat promise that any number of rows is free.
        start = min(bisect_left(known, known[-1] / 4), len(known) - 2)
        last = (seconds[-1] - seconds[start]) / (known[-1] - known[start])
        return max(last, (seconds[-1] - seconds[0]) / (known[-1] - known[0]))


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Seconds of every part of a cycle.

    Attributes:
        verify: by tree rows (root included) and requests.
        first_block: by new positions and requests.
        later_block: by leaves and requests.
        overhead_s: committing and emitting, per cycle.
        plain: verification of one row by requests where nothing drafts in between; None is as ``verify`` says.
    """

    verify: RowCurve
    first_block: RowCurve
    later_block: RowCurve
    overhead_s: float = 0.0
    plain: RowCurve | None = None

    def verify_s(self, rows: int, batch: int) -> float:
        """Seconds of one verification."""
        return self.verify.at(rows, batch)

    def draft_s(self, block: int, leaves: int, batch: int) -> float:
        """Seconds of one drafter block (0-based); for block 0 ``leaves`` is the number of new positions."""
        return (self.later_block if block else self.first_block).at(leaves, batch)

    def plain_s(self, batch: int) -> float:
        """Seconds of one cycle without speculation."""
        return self.one_row_s(batch) + self.overhead_s

    def one_row_s(self, batch: int) -> float:
        """Seconds of the verification in such a cycle."""
        return (self.plain or self.verify).at(1, batch)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for logs and benchmark files."""
        curves = {"verify": self.verify, "first_block": self.first_block, "later_block": self.later_block}
        curves |= {} if self.plain is None else {"plain": self.plain}
        return {"overhead_s": self.overhead_s} | {
            name: {"total_rows": list(c.total_rows), "seconds": list(c.seconds), "per_request_s": c.per_request_s}
            for name, c in curves.items()
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CostCurve:
        """Reads :meth:`to_dict`."""

        def curve(name: str) -> RowCurve:
            part = data[name]
            return RowCurve(tuple(part["total_rows"]), tuple(part["seconds"]), part["per_request_s"])

        plain = curve("plain") if "plain" in data else None
        return cls(curve("verify"), curve("first_block"), curve("later_block"), data["overhead_s"], plain)


class Phase(StrEnum):
    """Parts of a cycle whose cost is corrected separately."""

    VERIFY = "verify"
    FIRST_BLOCK = "first_block"
    LATER_BLOCK = "later_block"


class OnlineCorrection:
    """Multiplies predicted seconds by what measurements have shown: an exponential average of log(measured/predicted).

    Args:
        rate: weight of a new measurement.
        limit: a factor stays between 1/limit and limit; so does what one measurement may say.
    """

    def __init__(self, rate: float = 0.05, limit: float = 8.0) -> None:
        if not 0 < rate <= 1 or limit <= 1:
            raise ValueError("online correction: rate must be in (0, 1] and limit above 1")
        self._rate, self._log_limit = rate, math.log(limit)
        self._log = dict.fromkeys(Phase, 0.0)

    def factor(self, phase: Phase) -> float:
        """What to multiply the curve's seconds with."""
        return math.exp(self._log[phase])

    def observe(self, phase: Phase, measured_s: float, predicted_s: float) -> None:
        """Takes one measurement; ``predicted_s`` is the curve's own answer, not yet corrected."""
        if measured_s <= 0 or predicted_s <= 0:
            return  # a clock too coarse to see the phase says nothing about it
        error = math.log(measured_s / predicted_s)
        error = min(max(error, -self._log_limit), self._log_limit)
        self._log[phase] += self._rate * (error - self._log[phase])


def _monotone(points: dict[int, float]) -> RowCurve:
    rows = sorted(points)
    seconds = non_decreasing([max(points[r], 1e-9) for r in rows], [1.0] * len(rows))
    return RowCurve(tuple(rows), tuple(seconds))

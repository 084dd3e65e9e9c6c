"""How the policies of ``bench shift`` fared over time, for its picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specblock.bandit.simulation.scenario import START_S
from specblock.daemon.shift_rows import PolicyRun
from specblock.daemon.shift_traffic import ShiftTraffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One policy's run over time, for a picture.

    Attributes:
        hours: ends of the intervals.
        acceptance: within each interval; None: nothing was served.
        balance_s: device-seconds saved so far against doing nothing, everything charged.
        promoted_hours: when versions went live.
    """

    policy: str
    hours: tuple[float, ...]
    acceptance: tuple[float | None, ...]
    balance_s: tuple[float, ...]
    promoted_hours: tuple[float, ...]


def curves(runs: Sequence[PolicyRun], traffic: ShiftTraffic, static: str, intervals: int = 96) -> list[Curve]:
    """Curves of runs through the same traffic; one of them is ``static``."""
    idle = next(r for r in runs if r.policy == static)
    ends = START_S + (traffic.end_s - START_S) * (np.arange(intervals) + 1) / intervals
    marks = np.searchsorted(traffic.time_s, ends)
    return [
        Curve(
            policy=r.policy,
            hours=tuple(((ends - START_S) / 3600).tolist()),
            acceptance=tuple(
                float(r.committed[a:b].sum() / r.cycles[a:b].sum()) if b > a else None
                for a, b in zip([0, *marks[:-1]], marks, strict=True)
            ),
            balance_s=tuple(
                float(idle.request_s[:mark].sum() - r.request_s[:mark].sum())
                - sum(device_s for time_s, device_s in r.charges if time_s <= end)
                for mark, end in zip(marks, ends, strict=True)
            ),
            promoted_hours=tuple((time_s - START_S) / 3600 for time_s in r.promoted_s),
        )
        for r in runs
    ]

"""Predicted seconds of cycles: the measured curve, corrected by what cycles have taken since.

Legend: B requests in the cycle, of which D draft; N row counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from specblock.daemon.cost_curve import CostCurve, Floats, OnlineCorrection, Phase
from specblock.daemon.plain_price import PlainPrice
from specblock.drafter.plan import DraftPlan

USUAL_POSITIONS = 8
"""More new positions than this are catching up, which says nothing about the usual cost."""

_OVERHEAD_RATE = 0.05
_SIZES = 4096  # remembered; every cycle asks about the same few


class CycleCost:
    """Seconds by phase, kept current."""

    def __init__(self, curve: CostCurve, correction: OnlineCorrection | None = None) -> None:
        self.curve = curve
        self.correction = correction or OnlineCorrection()
        self.plain = PlainPrice()
        self._curve_draft_s = lru_cache(_SIZES)(curve.draft_s)
        self._curve_verify_s = lru_cache(_SIZES)(curve.verify_s)
        self._one_row_s = lru_cache(_SIZES)(curve.one_row_s)
        self._verify: dict[int, Floats] = {}
        self._overhead_s = {True: curve.overhead_s, False: curve.overhead_s}

    @property
    def overhead_s(self) -> float:
        """Seconds of a speculating cycle outside drafter blocks and verification."""
        return self._overhead_s[True]

    def verify_s(self, most_nodes: int, batch: int) -> Floats:
        """Seconds of verifying 0 .. ``most_nodes`` nodes per request, the root besides."""
        table = self._verify.get(batch)
        if table is None or len(table) <= most_nodes:
            rows_N = np.arange(1, most_nodes + 2, dtype=np.float64)
            table = self._verify[batch] = self.curve.verify.table(rows_N, batch)
        seconds: Floats = table[: most_nodes + 1] * self.correction.factor(Phase.VERIFY)
        return seconds

    def block_s(self, block: int, leaves: int, drafting: int) -> float:
        """Seconds of one drafter block; for block 0 ``leaves`` counts new positions."""
        phase = Phase.LATER_BLOCK if block else Phase.FIRST_BLOCK
        return self._curve_draft_s(block, leaves, drafting) * self.correction.factor(phase)

    def draft_s(self, leaf_caps: Sequence[int], drafting: int, positions: int = 1) -> float:
        """Seconds of all drafter blocks of a cycle with so many new positions."""
        later_s = sum(self.block_s(block, leaves, drafting) for block, leaves in enumerate(leaf_caps, start=1))
        return self.block_s(0, positions, drafting) + later_s

    def cycle_s(self, plan: DraftPlan, drafting: int, batch: int, positions: int = 1) -> float:
        """Seconds of a cycle in which D of B requests draft by a plan, with so many new positions."""
        verify_s = self._curve_verify_s(plan.node_budget + 1, batch) * self.correction.factor(Phase.VERIFY)
        return self.draft_s(plan.leaf_caps, drafting, positions) + verify_s + self.overhead_s

    def plain_s(self, batch: int) -> float:
        """Seconds of a cycle without speculation."""
        return self._predicted_plain_s(batch) * self.plain.factor(batch)

    def observe_plain(self, verify_s: float, total_s: float, batch: int, *, amid_speculation: bool) -> None:
        """Learns from a cycle without speculation.

        Between speculating cycles the factor of larger trees is fresh, and what is left over is the shape of the curve
        at one row, and what a drafter's reading does to the target's. With speculation off nothing else is measured, so
        the cycle tells of the machine's speed as a whole.
        """
        if amid_speculation:
            self.plain.observe(batch, total_s, self._predicted_plain_s(batch))
        else:
            predicted_s = self._one_row_s(batch) * self.plain.factor(batch)
            self.correction.observe(Phase.VERIFY, verify_s, predicted_s)
        self._see_overhead(False, total_s - verify_s)

    def observe_draft(self, block_s: Sequence[float], positions: int, leaf_caps: Sequence[int], drafting: int) -> None:
        """Learns from the measured seconds of a cycle's drafter blocks."""
        if block_s and positions <= USUAL_POSITIONS:
            self.correction.observe(Phase.FIRST_BLOCK, block_s[0], self._curve_draft_s(0, positions, drafting))
        for block, (seconds, leaves) in enumerate(zip(block_s[1:], leaf_caps, strict=False), start=1):
            self.correction.observe(Phase.LATER_BLOCK, seconds, self._curve_draft_s(block, leaves, drafting))

    def observe_verify(self, verify_s: float, rows: int, batch: int, other_s: float | None) -> None:
        """Learns from the verification and, if known, the remaining seconds of a speculating cycle."""
        self.correction.observe(Phase.VERIFY, verify_s, self._curve_verify_s(rows, batch))
        if other_s is not None:
            self._see_overhead(True, other_s)

    def _predicted_plain_s(self, batch: int) -> float:
        return self._one_row_s(batch) * self.correction.factor(Phase.VERIFY) + self._overhead_s[False]

    def _see_overhead(self, speculating: bool, seconds: float) -> None:
        self._overhead_s[speculating] += _OVERHEAD_RATE * (max(0.0, seconds) - self._overhead_s[speculating])

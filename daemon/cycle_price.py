"""What a cycle usually takes, by which speculation is judged: the corrected curves, and what those do not know.

By the curves, as plain decoding is: what slows the machine down for a while slows both, and a cycle's own seconds would
blame drafting for it.
"""

from __future__ import annotations

from specblock.daemon.cycle_cost import USUAL_POSITIONS, CycleCost
from specblock.daemon.planner_types import Cycle, CycleResult
from specblock.drafter.forgetting import ForgettingRatio
from specblock.drafter.plan import DraftPlan

_EVERY = 4  # of the cycles that are much alike one is looked at: that takes what drafts win
_Kind = tuple[int, int, DraftPlan, bool]
_HALF_LIFE, _PRIOR_CYCLES, _MOST = 200.0, 30.0, 8.0


class CyclePrice:
    """Learns from cycles what they take, in the curves and beyond them."""

    def __init__(self) -> None:
        # Real over modelled seconds, of cycles with drafts and of plain ones; without what is done to learn.
        self._drafted, self._plain = ForgettingRatio(_HALF_LIFE), ForgettingRatio(_HALF_LIFE)
        self._unseen = 0  # cycles since one was looked at
        self._kind: _Kind | None = None  # of the cycle looked at last
        self._usual_s = 0.0  # of this kind

    def drafter_changed(self) -> None:
        """A new drafter serves: what drafting takes beyond the curves is unknown again."""
        self._drafted = ForgettingRatio(_HALF_LIFE)
        self._kind = None

    def plain(self, cycle: Cycle, result: CycleResult, seconds: float, cost: CycleCost) -> None:
        """Learns from a cycle without drafts: of looks those that count, while nobody drafts one in four."""
        self._unseen += 1
        looked = cycle.look is not None and cycle.look.counts
        if not looked and (cycle.look is not None or self._unseen < _EVERY):
            return
        self._unseen = 0
        self._plain.add(min(seconds / cycle.plain_s, _MOST))
        cost.observe_plain(result.verify_s, seconds, cycle.batch, amid_speculation=looked)

    def is_due(self, cycle: Cycle) -> bool:
        """Whether a cycle with drafts is to be looked at: one that thought, is new in kind, or one in four."""
        self._unseen += 1
        return self._kind != _kind(cycle) or cycle.thought or self._unseen >= _EVERY

    def drafted(self, cycle: Cycle, result: CycleResult, seconds: float, cost: CycleCost) -> None:
        """Learns from a cycle with drafts."""
        assert result.tree is not None and cycle.nodes, "a tree that these limits did not bound"
        batch, plan, leaf_caps = cycle.batch, cycle.plan, cycle.growth.leaf_caps
        cost.observe_draft(cycle.block_s, cycle.positions, leaf_caps, cycle.drafting)
        other_s = None if cycle.spent_s is None else result.other_s + max(0.0, result.draft_s - cycle.spent_s)
        if cycle.timed or other_s is not None:  # else verification has waited for the drafter's device
            cost.observe_verify(result.verify_s, result.tree.num_rows, batch, other_s)
        # Probes draft for one request only, and catching up is paid once: neither says what drafting costs.
        usual = cycle.positions <= USUAL_POSITIONS
        drafting, positions = batch if cycle.probing else cycle.drafting, cycle.positions if usual else 1
        modelled_s = cost.cycle_s(plan, drafting, batch, positions)
        if usual and not cycle.probing:
            # Thinking that is done to learn becomes rare, and drafts are not to be given up for it.
            own_s = seconds - (cycle.thought_s if cycle.learns else 0.0)
            self._drafted.add(min(own_s / modelled_s, _MOST))
        beyond = self._drafted.value(1.0, _PRIOR_CYCLES) / self._plain.value(1.0, _PRIOR_CYCLES)
        self._kind, self._usual_s, self._unseen = _kind(cycle), modelled_s * beyond, 0

    @property
    def usual_s(self) -> float:
        """Seconds that cycles of the kind looked at last usually take."""
        return self._usual_s


def _kind(cycle: Cycle) -> _Kind:
    """Requests, those that draft, sizes, and whether it is a probe: that is priced as if all requests drafted."""
    return cycle.batch, cycle.drafting, cycle.plan, cycle.probing

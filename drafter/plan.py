"""Sizes of a cycle's draft tree: who chooses them, and what was chosen.

Legend: B requests, m nodes that may be extended, M raw candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from specblock.drafter.config import DraftSettings


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """What one cycle drafted.

    Attributes:
        leaf_caps: leaves extended by block 2, 3, ...; as many entries as later blocks ran.
        node_budget: most draft nodes verified; 0 is a cycle without speculation.
    """

    leaf_caps: tuple[int, ...]
    node_budget: int

    @property
    def blocks(self) -> int:
        """Drafter forwards of the cycle."""
        return 1 + len(self.leaf_caps) if self.node_budget else 0

    def to_list(self) -> list[int]:
        """[node budget, leaf caps ...] for storing."""
        return [self.node_budget, *self.leaf_caps]

    @classmethod
    def from_list(cls, values: Sequence[int]) -> DraftPlan:
        """Reads ``to_list``."""
        return cls(tuple(values[1:]), values[0])


NO_SPECULATION = DraftPlan((), 0)


class Limits(Protocol):
    """Chooses the sizes of a cycle while it is drafted."""

    def more(self, block: int) -> bool:
        """Whether a block after ``block`` (0-based) is considered; asked before what it could extend is known."""

    def leaves(self, block: int, score_Bm: Tensor) -> int:
        """Leaves that the block after ``block`` (0-based) extends; 0 drafts no further block.

        Args:
            block: the block that was just expanded.
            score_Bm: cumulative scores of the nodes that may be extended, -inf where invalid.
        """

    def nodes(self, score_BM: Tensor) -> int:
        """Node budget, at least 1, from the cumulative scores of all raw candidates (-inf where invalid)."""


class FixedLimits:
    """The sizes of the settings, every cycle."""

    def __init__(self, settings: DraftSettings) -> None:
        self._leaf_cap, self._node_budget = settings.leaf_cap, settings.node_budget

    def more(self, block: int) -> bool:
        """See Limits."""
        return True

    def leaves(self, block: int, score_Bm: Tensor) -> int:
        """See Limits."""
        return self._leaf_cap

    def nodes(self, score_BM: Tensor) -> int:
        """See Limits."""
        return self._node_budget


class PlannedLimits:
    """The sizes of a recorded cycle, for replay."""

    def __init__(self, plan: DraftPlan) -> None:
        self._plan = plan

    def more(self, block: int) -> bool:
        """See Limits."""
        return block < len(self._plan.leaf_caps)

    def leaves(self, block: int, score_Bm: Tensor) -> int:
        """See Limits."""
        return self._plan.leaf_caps[block] if self.more(block) else 0

    def nodes(self, score_BM: Tensor) -> int:
        """See Limits."""
        return self._plan.node_budget

"""What was chosen lately, for the cycles between two weighings.

Weighing every choice takes a millisecond or two of every cycle, as much as a small drafter's forward. How many leaves
are worth another block, and what rows cost, hardly change from one cycle to the next; what does change is how sure the
drafter is. So leaves stay as they were, and the nodes of a cycle are chosen by its own scores and the costs of before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specblock.daemon.tree_outlook import best_budget
from specblock.drafter.survival import Floats

_MOST_KINDS = 64  # of batches told apart


@dataclass(slots=True)
class Habit:
    """Choices for batches of so many requests, of which so many draft."""

    batch: int
    _cycles: int = 0
    _leaf_caps: tuple[int, ...] | None = None
    _scale: float = 1.0
    _fixed_s: float = 0.0
    _verify_s: Floats | None = None

    def due(self, settle_cycles: int, weigh_every: int) -> bool:
        """Whether the next cycle is to be weighed; counts it."""
        self._cycles += 1
        return self._leaf_caps is None or self._cycles <= settle_cycles or self._cycles % weigh_every == 0

    def chose(self, leaf_caps: Sequence[int], scale: float, fixed_s: float, verify_s_N: Floats) -> None:
        """Takes over what a weighing chose, and by what.

        Args:
            leaf_caps: leaves of every later block.
            scale: factor on the expected gain.
            fixed_s: seconds of the cycle beside verification.
            verify_s_N: seconds of verification with 1 .. N nodes.
        """
        self._leaf_caps, self._scale, self._fixed_s = tuple(leaf_caps), scale, fixed_s
        self._verify_s = verify_s_N

    def leaves(self, block: int) -> int:
        """How many leaves of ``block`` were extended."""
        return self._leaf_caps[block] if self._leaf_caps is not None and block < len(self._leaf_caps) else 0

    def nodes(self, gain_N: Floats) -> int:
        """The best node budget for expected accepted drafts by budget, at the costs of before."""
        assert self._verify_s is not None, "a cycle is weighed before one follows it"
        known = min(len(gain_N), len(self._verify_s))
        return best_budget(self._scale * gain_N[:known], self.batch, self._fixed_s, self._verify_s[:known])


class Habits:
    """A habit for every kind of batch that was seen lately: requests come and go, and the same few kinds come again."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], Habit] = {}

    def of(self, batch: int, drafting: int) -> Habit:
        """The habit of a cycle of so many requests, of which so many draft."""
        habit = self._found.pop((batch, drafting), None) or Habit(batch)
        self._found[batch, drafting] = habit  # used last is at the end
        if len(self._found) > _MOST_KINDS:
            del self._found[next(iter(self._found))]
        return habit

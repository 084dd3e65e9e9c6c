"""Which cycles the planner learns from.

Learning what a cycle says about survival takes the host time, and from one cycle to the next little of it is news: all
of a new kind of batch is learned from, then every so many cycles.
"""

from __future__ import annotations

_MOST_KINDS = 64


class LearningPace:
    """Counts cycles by kind of batch: requests come and go, and the same few kinds come again.

    Args:
        settle_cycles: first cycles of a kind, all learned from.
        learn_every: of later ones, every so many.
    """

    def __init__(self, settle_cycles: int, learn_every: int) -> None:
        self._settle_cycles, self._learn_every = settle_cycles, learn_every
        self._cycles: dict[tuple[int, int], int] = {}

    def due(self, kind: tuple[int, int]) -> bool:
        """Whether to learn from the next cycle of ``kind`` (requests, those that draft); counts it."""
        count = self._cycles.pop(kind, 0) + 1
        self._cycles[kind] = count  # used last is at the end
        if len(self._cycles) > _MOST_KINDS:
            del self._cycles[next(iter(self._cycles))]
        return count <= self._settle_cycles or count % self._learn_every == 0

    def begin_anew(self) -> None:
        """Everything is new again."""
        self._cycles.clear()

"""What the planner need not do in every cycle.

Learning what a cycle says about survival takes the host time, and from one cycle to the next little of it is news: all
of a new kind of batch is learned from, then every so many cycles. Whether a leaf is worth another block depends on how
sure the drafter is right there, so that is asked in every cycle that is learned from, and in the others where it pays.
"""

from __future__ import annotations

from dataclasses import dataclass

from specblock.drafter.forgetting import ForgettingRatio

_MOST_KINDS, _MOST_BLOCKS = 64, 8
_FEW = 16  # answers that say nothing about the next one
_RATE = 0.04
_HALF_LIFE_ANSWERS = 100.0


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


@dataclass(slots=True)
class _Answers:
    seen: int = 0
    gain: float = 0.0


class BlockProspects:
    """What asking about another block has brought, by kind of batch and block, and what it costs."""

    def __init__(self) -> None:
        self._answers: dict[tuple[int, int, int], _Answers] = {}
        self._asking = ForgettingRatio(_HALF_LIFE_ANSWERS)

    def worth_asking(self, kind: tuple[int, int], block: int, cycle_s: float) -> bool:
        """Whether answers bring more of a cycle than asking takes of it; they must have been given to be known.

        Args:
            kind: requests, those that draft.
            block: after which another one would come.
            cycle_s: seconds of a cycle of this kind.
        """
        answers = self._answers.get((*kind, block))
        return answers is None or answers.seen < _FEW or answers.gain * cycle_s > self._asking.value()

    def answered(self, kind: tuple[int, int], block: int, best_ratio: float) -> None:
        """Notes an answer: tokens per second with the best other block over those without any."""
        answers = self._answers.pop((*kind, block), _Answers())
        self._answers[(*kind, block)] = answers  # used last is at the end
        if len(self._answers) > _MOST_KINDS * _MOST_BLOCKS:
            del self._answers[next(iter(self._answers))]
        answers.seen += 1
        answers.gain += max(1 / answers.seen, _RATE) * (max(0.0, best_ratio - 1.0) - answers.gain)

    def asked(self, seconds: float) -> None:
        """Notes what asking took."""
        self._asking.add(seconds)

    def begin_anew(self) -> None:
        """Everything is new again."""
        self._answers.clear()

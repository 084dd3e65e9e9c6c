"""A question that every cycle poses, and whether its answer has to be worked out again.

Working out how many leaves or nodes are best takes time, and answers differ little from cycle to cycle where costs are
flat. The choice that was best on average stands; it is reconsidered in every cycle only where that has brought clearly
more seconds than it takes, or has promised them as far as nobody can tell what it brought.

Legend: C choices.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from specblock.drafter.forgetting import ForgettingRatio
from specblock.drafter.survival import Floats

_MOST_QUESTIONS = 256
_FEW = 16  # answers that say nothing about the next one
_RATE = 0.02
# What an answer promises is the best of many estimates, and less comes of it; what asking takes is more than its own
# time, because it puts other things out of the caches (cycles that ask last longer than the questions take).
_MARGIN = 2.0
_MOST_ASKING = 5.0  # times the mean: one stall of the machine says nothing about thinking
_HALF_LIFE_ANSWERS = 100.0
# What one choice brings varies by far more than what it wins. Evidence fades by choices, and slowly by answers: what
# was given up for bad is tried again some time.
_ERROR_HALF_LIFE_CHOICES, _ERROR_HALF_LIFE_ANSWERS, _ERROR_PRIOR_CHOICES = 200.0, 2000.0, 32.0


class StandingChoice:
    """One question: the choice that has been best on average, and what reconsidering it brings.

    Attributes:
        choice: the best on average, the first of several; 0 before any answer.
        seen: answers to this question.
    """

    __slots__ = ("_asking", "_error", "_gain_s", "_mean_s_C", "_promised_s", "choice", "seen")

    def __init__(self) -> None:
        self.choice = 0
        self._mean_s_C: Floats = np.zeros(0)
        self._gain_s = self._promised_s = 0.0
        self._asking = ForgettingRatio(_HALF_LIFE_ANSWERS)
        self._error = ForgettingRatio(_ERROR_HALF_LIFE_CHOICES)
        self.seen = 0

    def worth_asking(self) -> bool:
        """Whether answers save more than they take; some must have been given for that to be known."""
        return self.seen < _FEW or self._gain_s > _MARGIN * self._asking.value()

    def corrected(self, saved_s_C: Floats) -> Floats:
        """Expected seconds saved, less what choices other than the first have fallen short of before."""
        result: Floats = saved_s_C.copy()
        result[1:] += self._error.value(0.0, _ERROR_PRIOR_CHOICES)
        return result

    def turned_out(self, expected_s: float, saved_s: float) -> None:
        """Notes what a choice other than the first was expected to save over the first, uncorrected, and what it did.

        It was made because it promised most, and of many promises the best is the one most likely too good.
        """
        self._error.add(saved_s - expected_s)
        if self._promised_s > 0:  # what asking has brought is known now
            self._gain_s += max(1 / self.seen, _RATE) * (saved_s - self._promised_s)

    def answered(self, saved_s_C: Floats, asking_s: float) -> None:
        """Notes an answer.

        Args:
            saved_s_C: seconds that each choice saves in this cycle, over anything that all have in common.
            asking_s: what working it out took on the host; an accelerator's idle time meanwhile is not known.
        """
        mean_s = self._asking.value()
        self._asking.add(min(asking_s, _MOST_ASKING * mean_s) if mean_s > 0 else asking_s)
        self._error.fade(0.5 ** (1 / _ERROR_HALF_LIFE_ANSWERS))
        if len(saved_s_C) != len(self._mean_s_C):
            self.seen = 0  # other sizes: another question
        self.seen += 1
        if self.seen == 1:
            self._mean_s_C, self.choice = saved_s_C, int(saved_s_C.argmax())
            self._gain_s = self._promised_s = 0.0
            return
        rate = max(1 / self.seen, _RATE)
        # By the choice that stood before this answer: one that knew the answer would look better than it is.
        gain_s = float(saved_s_C.max() - saved_s_C[self.choice])
        self._gain_s += rate * (gain_s - self._gain_s)
        self._promised_s = 0.0 if self.choice else gain_s  # over the first choice
        self._mean_s_C = self._mean_s_C + rate * (saved_s_C - self._mean_s_C)
        self.choice = int(self._mean_s_C.argmax())


class StandingChoices:
    """Questions by name; those not posed for long are forgotten."""

    def __init__(self) -> None:
        self._questions: dict[Hashable, StandingChoice] = {}

    def of(self, *name: Hashable) -> StandingChoice:
        """The question of this name, new if there is none."""
        question = self._questions.pop(name, None) or StandingChoice()
        self._questions[name] = question  # used last is at the end
        if len(self._questions) > _MOST_QUESTIONS:
            del self._questions[next(iter(self._questions))]
        return question

    def begin_anew(self) -> None:
        """Everything is new again."""
        self._questions.clear()

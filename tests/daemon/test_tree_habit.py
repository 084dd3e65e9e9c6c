"""What is kept between two weighings, and when the next one is due."""

from __future__ import annotations

import numpy as np

from specblock.daemon.tree_habit import Habit
from specblock.daemon.tree_outlook import best_budget


def test_everything_is_weighed_until_settled_and_then_every_so_often() -> None:
    habit = Habit()
    due = []
    for _ in range(40):
        due.append(habit.due(1, 1, 10, 4))
        if due[-1]:
            habit.chose((4,), 1.0, 0.01, np.ones(8))
    assert due[:10] == [True] * 10 and due[10:22] == [False, True, False, False] * 3
    assert habit.leaves(0) == 4 and habit.leaves(1) == 0
    assert not habit.due(3, 0, 10, 4), "without drafts there is nothing to weigh"
    assert habit.due(2, 1, 10, 4) and habit.leaves(0) == 0, "another batch starts anew"


def test_nothing_is_followed_that_was_never_weighed() -> None:
    habit = Habit()
    assert all(habit.due(1, 1, 0, 100) for _ in range(5))
    habit.chose((), 1.0, 0.01, np.ones(8))
    assert not habit.due(1, 1, 0, 100)


def test_nodes_follow_the_scores_at_the_costs_of_before() -> None:
    habit, verify_s = Habit(), 0.01 + 2e-3 * np.arange(8)
    habit.due(2, 2, 0, 4)
    habit.chose((), 1.5, 0.02, verify_s)
    for gain in (np.linspace(0.1, 0.8, 8), np.linspace(1.0, 1.2, 8), np.array([0.5, 1.5, 1.6])):
        assert habit.nodes(gain) == best_budget(1.5 * gain, 2, 0.02, verify_s[: len(gain)])
    assert habit.nodes(np.linspace(0.2, 9.0, 20)) <= 8, "no further than costs are known"

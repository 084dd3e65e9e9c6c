"""What is kept between two weighings, and when the next one is due."""

from __future__ import annotations

import numpy as np

from specblock.daemon.tree_habit import Habit, Habits
from specblock.daemon.tree_outlook import best_budget


def test_everything_is_weighed_until_settled_and_then_every_so_often() -> None:
    habit = Habit(1)
    due = []
    for _ in range(40):
        due.append(habit.due(10, 4))
        if due[-1]:
            habit.chose((4,), 1.0, 0.01, np.ones(8))
    assert due[:10] == [True] * 10 and due[10:22] == [False, True, False, False] * 3
    assert habit.leaves(0) == 4 and habit.leaves(1) == 0


def test_kinds_of_batches_that_take_turns_keep_their_habits() -> None:
    habits, weighed = Habits(), 0
    for number in range(400):
        habit = habits.of(8 - number % 2, 8 - number % 2)
        due = habit.due(20, 4)
        weighed += due
        if due:
            habit.chose((), 1.0, 0.01, np.ones(8))
    assert 2 * 20 + 2 * 180 / 4 - 2 <= weighed <= 2 * 20 + 2 * 180 / 4 + 2
    for number in range(100):
        habits.of(1000 + number, 1)
    assert habits.of(8, 8).due(0, 1000), "what was not seen for long is forgotten"


def test_nothing_is_followed_that_was_never_weighed() -> None:
    habit = Habit(1)
    assert all(habit.due(0, 100) for _ in range(5))
    habit.chose((), 1.0, 0.01, np.ones(8))
    assert not habit.due(0, 100)


def test_nodes_follow_the_scores_at_the_costs_of_before() -> None:
    habit, verify_s = Habit(2), 0.01 + 2e-3 * np.arange(8)
    habit.due(0, 4)
    habit.chose((), 1.5, 0.02, verify_s)
    for gain in (np.linspace(0.1, 0.8, 8), np.linspace(1.0, 1.2, 8), np.array([0.5, 1.5, 1.6])):
        assert habit.nodes(gain) == best_budget(1.5 * gain, 2, 0.02, verify_s[: len(gain)])
    assert habit.nodes(np.linspace(0.2, 9.0, 20)) <= 8, "no further than costs are known"

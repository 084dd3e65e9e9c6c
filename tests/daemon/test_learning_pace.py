"""Which cycles are learned from, and which are asked about another block."""

from __future__ import annotations

from specblock.daemon.learning_pace import LearningPace


def test_every_cycle_until_settled_and_then_every_so_many() -> None:
    pace = LearningPace(10, 4)
    assert [number for number in range(1, 25) if pace.due((1, 1))] == [*range(1, 11), 12, 16, 20, 24]
    pace.begin_anew()
    assert all(pace.due((1, 1)) for _ in range(10)) and not pace.due((1, 1))


def test_kinds_of_batches_that_take_turns_settle_each_for_itself() -> None:
    pace = LearningPace(20, 4)
    learned = sum(pace.due((8 - number % 2, 8 - number % 2)) for number in range(400))
    assert learned == 2 * 20 + 2 * 180 / 4
    for number in range(64):
        pace.due((1000 + number, 1))
    assert all(pace.due((8, 8)) for _ in range(20)), "what was not seen for long is forgotten"

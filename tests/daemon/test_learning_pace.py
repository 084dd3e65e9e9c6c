"""Which cycles are learned from, and which are asked about another block."""

from __future__ import annotations

from random import Random

import pytest

from specblock.daemon.learning_pace import BlockProspects, LearningPace


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


def test_what_never_pays_is_not_asked_about() -> None:
    prospects, draws = BlockProspects(), Random(1)
    for number in range(200):
        assert prospects.worth_asking((1, 1), 0, 0.01) == (number < 16), number
        prospects.asked(1e-4)
        prospects.answered((1, 1), 0, 0.7 + 0.25 * draws.random())
    assert prospects.worth_asking((2, 2), 0, 0.01) and prospects.worth_asking((1, 1), 1, 0.01)
    prospects.begin_anew()
    assert prospects.worth_asking((1, 1), 0, 0.01)


@pytest.mark.parametrize(("asking_s", "worth"), [(5e-5, True), (1e-3, False)])
def test_what_sometimes_pays_is_asked_about_where_that_is_cheap(asking_s: float, worth: bool) -> None:
    prospects, draws, asked = BlockProspects(), Random(2), 0
    for number in range(1000):
        asked += number >= 100 and prospects.worth_asking((1, 1), 0, 0.01)
        prospects.asked(asking_s)
        prospects.answered((1, 1), 0, 1.2 if draws.random() < 0.15 else 0.85)  # 3 % of 10 ms: 0.3 ms
    assert (asked > 850) == worth and (asked < 50) == (not worth), asked


def test_some_answers_of_another_kind_are_enough_to_ask_again() -> None:
    prospects = BlockProspects()
    for number in range(500):
        prospects.asked(1e-4)
        prospects.answered((1, 1), 0, 0.72 + 0.02 * (number % 3))
    assert not prospects.worth_asking((1, 1), 0, 0.01)
    for _ in range(5):
        prospects.answered((1, 1), 0, 1.1)
    assert prospects.worth_asking((1, 1), 0, 0.01)

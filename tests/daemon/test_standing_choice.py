"""Which questions are asked again in every cycle, and what is done where they are not."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specblock.daemon.standing_choice import StandingChoice, StandingChoices


def test_what_is_always_best_stands_without_asking() -> None:
    question, draws = StandingChoice(), Random(1)
    for number in range(200):
        assert question.worth_asking() == (number < 16), number
        question.answered(1e-3 * np.array([draws.random(), 2 + draws.random(), 0.5]), 1e-4)
    assert question.choice == 1


@pytest.mark.parametrize(("asking_s", "worth"), [(5e-5, True), (1e-3, False)])
def test_what_differs_between_cycles_is_asked_where_that_is_cheap(asking_s: float, worth: bool) -> None:
    question, draws, asked = StandingChoice(), Random(2), 0
    for number in range(1000):
        asked += number >= 100 and question.worth_asking()
        better = draws.random() < 0.15  # 2 ms in 15 of 100 cycles: 0.3 ms, and twice the cost is asked for
        question.answered(np.array([0.0, 2e-3 if better else -2e-3]), asking_s)
    assert question.choice == 0
    assert (asked > 850) == worth and (asked < 50) == (not worth), asked


@given(st.lists(st.lists(st.floats(-1, 1), min_size=4, max_size=4), min_size=1, max_size=30))
def test_the_choice_is_the_best_on_average_while_answers_are_few(answers: list[list[float]]) -> None:
    question = StandingChoice()
    for answer in answers:
        question.answered(np.array(answer), 0.0)
    means = np.mean(answers, axis=0)
    assert means[question.choice] >= means.max() - 1e-9


def test_another_best_is_noticed() -> None:
    question = StandingChoice()
    for _ in range(500):
        question.answered(np.array([1e-3, 0.0]), 1e-4)
    assert question.choice == 0 and not question.worth_asking()
    for _ in range(12):
        question.answered(np.array([0.0, 1e-3]), 1e-4)
    assert question.worth_asking(), "what was right before is not now"
    for _ in range(200):
        question.answered(np.array([0.0, 1e-3]), 1e-4)
    assert question.choice == 1 and not question.worth_asking()


def test_answers_of_another_size_begin_anew() -> None:
    question = StandingChoice()
    for _ in range(50):
        question.answered(np.array([0.0, 1.0, 0.0]), 0.0)
    question.answered(np.array([1.0, 0.0]), 0.0)
    assert question.choice == 0 and question.seen == 1 and question.worth_asking()


def test_questions_are_told_apart_and_their_number_is_bounded() -> None:
    questions = StandingChoices()
    questions.of("nodes", 1).answered(np.array([0.0, 1.0]), 0.0)
    questions.of("nodes", 2).answered(np.array([1.0, 0.0]), 0.0)
    assert questions.of("nodes", 1).choice == 1 and questions.of("nodes", 2).choice == 0
    for number in range(255):
        questions.of("leaves", number)
        questions.of("nodes", 1)
    assert questions.of("nodes", 1).seen == 1 and questions.of("nodes", 2).seen == 0
    questions.begin_anew()
    assert questions.of("nodes", 1).seen == 0


def test_a_choice_that_falls_short_of_its_promises_is_made_less_and_asked_about_less() -> None:
    question = StandingChoice()
    promising = np.array([0.0, 1e-3])
    for number in range(400):
        saved_s = question.corrected(promising if number % 3 == 0 else -promising)
        taken = int(saved_s.argmax())
        question.answered(saved_s, 1e-4)
        if taken:
            question.turned_out(1e-3, -1e-3)
    assert question.choice == 0 and not question.worth_asking()
    assert question.corrected(promising)[1] < 0, "and would not be made if asked about"


def test_where_promises_are_kept_nothing_is_corrected() -> None:
    question = StandingChoice()
    for number in range(200):
        saved_s = np.array([0.0, 1e-3 if number % 2 else -1e-3])
        question.answered(question.corrected(saved_s), 1e-4)
        if number % 2:
            question.turned_out(1e-3, 1e-3)
    assert question.worth_asking()
    assert question.corrected(np.array([0.0, 1e-3])) == pytest.approx([0.0, 1e-3])

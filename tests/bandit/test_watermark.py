"""Exactly once, in any order, with losses counted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from specblock.bandit.watermark import Watermarks


@given(st.lists(st.integers(0, 60), max_size=150))
def test_each_sequence_is_accepted_once_in_any_order(sequences: list[int]) -> None:
    marks = Watermarks()
    accepted = [s for s in sequences if marks.accept("e", s, 1.0, patience=100)]
    assert sorted(accepted) == sorted(set(sequences)) and len(accepted) == len(set(sequences))
    assert marks.lost == 0
    assert marks.missing == (max(sequences) + 1 - len(set(sequences)) if sequences else 0)


@given(st.lists(st.integers(0, 300), max_size=150), st.integers(1, 20))
def test_every_sequence_is_accepted_missing_or_lost(sequences: list[int], patience: int) -> None:
    marks = Watermarks()
    accepted = {s for s in sequences if marks.accept("e", s, 1.0, patience)}
    sent = max(sequences) + 1 if sequences else 0
    assert len(accepted) + marks.missing + marks.lost == sent
    assert marks.missing <= patience
    assert not any(marks.accept("e", s, 1.0, patience) for s in accepted), "never twice"


@given(st.permutations(list(range(30))))
def test_the_marks_do_not_depend_on_the_order(order: list[int]) -> None:
    marks, plain = Watermarks(), Watermarks()
    for s in order:
        assert marks.accept("e", s, float(s), 100)
    for s in range(30):
        plain.accept("e", s, float(s), 100)
    assert marks == plain


def test_a_huge_jump_costs_no_memory() -> None:
    marks = Watermarks()
    assert marks.accept("e", 10**12, 1.0, patience=50)
    assert marks.lost == 10**12 - 50 and marks.missing == 50


def test_incarnations_are_apart_and_the_longest_silent_is_forgotten_with_its_losses() -> None:
    marks = Watermarks()
    assert marks.accept("a", 0, 1.0, 10) and marks.accept("b", 2, 5.0, 10) and marks.accept("c", 3, 3.0, 10)
    marks.forget(2)
    assert set(marks.marks) == {"b", "c"}
    marks.forget(1)
    assert set(marks.marks) == {"b"} and marks.retired_lost == 3
    assert marks.missing == 2

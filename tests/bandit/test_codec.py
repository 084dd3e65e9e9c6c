"""Dataclasses to JSON and back."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specblock.bandit.codec import digest, dumps, loads


@dataclass(frozen=True)
class Leaf:
    x: float
    n: int | None = None


@dataclass(frozen=True)
class Tree:
    name: str
    leaves: tuple[Leaf, ...] = ()
    by_name: dict[str, Leaf] = field(default_factory=dict)
    pair: tuple[int, str] = (0, "")
    flags: list[bool] = field(default_factory=list)


LEAVES = st.builds(Leaf, st.floats(allow_nan=False, allow_infinity=False), st.none() | st.integers())


@given(
    st.builds(
        Tree,
        st.text(),
        st.lists(LEAVES).map(tuple),
        st.dictionaries(st.text(), LEAVES),
        st.tuples(st.integers(), st.text()),
        st.lists(st.booleans()),
    )
)
def test_round_trip_is_exact(tree: Tree) -> None:
    assert loads(Tree, dumps(tree)) == tree


def test_order_of_keys_does_not_matter_for_the_digest() -> None:
    a, b = Leaf(1.0), Leaf(2.0)
    assert digest(Tree("t", by_name={"a": a, "b": b})) == digest(Tree("t", by_name={"b": b, "a": a}))
    assert digest(Tree("t")) != digest(Tree("u"))


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("{}", r"\$: field 'name' is missing"),
        ('{"name": 1}', r"\$\.name: expected str, got int"),
        ('{"name": "t", "leaves": [{"x": true}]}', r"\$\.leaves\[0\]\.x: expected float"),
        ('{"name": "t", "by_name": {"k": {"x": 1, "n": 1.5}}}', r"\$\.by_name\.k\.n: expected int"),
        ('{"name": "t", "pair": [1]}', r"\$\.pair: expected a list of 2"),
        ('{"name": "t", "more": 1}', r"\$: unknown field 'more'"),
        ("[]", r"\$: expected an object"),
    ],
)
def test_a_wrong_value_is_named_by_its_path(text: str, path: str) -> None:
    with pytest.raises(ValueError, match=path):
        loads(Tree, text)


def test_unknown_fields_can_be_ignored_and_integers_are_floats() -> None:
    assert loads(Leaf, '{"x": 1, "more": 2}', ignore_unknown=True) == Leaf(1.0)


def test_numbers_that_are_not_json_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        dumps(Leaf(float("nan")))

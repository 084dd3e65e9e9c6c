"""The wire format: what goes in comes out, and everything else is an EventError."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specblock.bandit.events import AcceptanceEvent, EventError, decode, encode
from tests.bandit.test_acceptance import EVENT

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
SECONDS = st.floats(0, 1e9, allow_nan=False)


@st.composite
def events(draw: st.DrawFn) -> AcceptanceEvent:
    histogram = tuple(draw(st.lists(st.integers(0, 50), max_size=9)))
    most = sum((a + 1) * n for a, n in enumerate(histogram))
    return AcceptanceEvent(
        incarnation=draw(TEXT),
        sequence=draw(st.integers(0, 2**52)),
        time_s=draw(SECONDS),
        request_id=draw(TEXT),
        engine=draw(TEXT),
        drafter_version=draw(TEXT),
        tenant=draw(TEXT),
        domain=draw(TEXT),
        cycles=sum(histogram),
        committed_tokens=draw(st.integers(0, most)),
        accepted_histogram=histogram,
        rank_histogram=tuple(draw(st.lists(st.integers(0, 99), min_size=4, max_size=4))),
        draft_s=draw(SECONDS),
        verify_s=draw(SECONDS),
        other_s=draw(SECONDS),
        draft_nodes=draw(st.integers(0, 10**9)),
        flagged=draw(st.booleans()),
        last=draw(st.booleans()),
    )


@given(events())
def test_round_trip(event: AcceptanceEvent) -> None:
    assert decode(encode(event)) == event


def changed(**changes: object) -> dict[str, str]:
    fields = encode(EVENT)
    return {**fields, "data": json.dumps({**json.loads(fields["data"]), **changes})}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {**encode(EVENT), "v": "2"},
        {**encode(EVENT), "type": "other"},
        {**encode(EVENT), "data": "{"},
        {**encode(EVENT), "data": "[]"},
        {**encode(EVENT), "data": "[" * 100_000},
        changed(text="the prompt"),
        changed(sequence=-1),
        changed(sequence=True),
        changed(cycles=11),
        changed(committed_tokens=10_000),
        changed(draft_s=float("nan")),
        changed(domain=""),
        changed(domain="x" * 257),
        changed(rank_histogram=[1, 2, 3]),
        changed(accepted_histogram=[3, 2, 3, -2]),
        changed(last="yes"),
    ],
)
def test_anything_else_is_an_event_error(fields: dict[str, str]) -> None:
    with pytest.raises(EventError):
        decode(fields)


@given(st.dictionaries(st.sampled_from(["v", "type", "data", "event_id"]), st.text(max_size=30)))
def test_garbage_never_raises_anything_else(fields: dict[str, str]) -> None:
    with pytest.raises(EventError):
        decode(fields)


@given(events())
def test_the_bytes_are_those_of_the_dataclass_in_field_order(event: AcceptanceEvent) -> None:
    assert encode(event)["data"] == json.dumps(asdict(event), separators=(",", ":"), allow_nan=False)

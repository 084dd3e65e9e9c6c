"""The fan-out rule against its definition, slot by slot."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specblock.drafter.config import DraftSettings
from specblock.drafter.fan_out import FanOutRule

probability = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.875, 1.0])
caps = st.lists(st.tuples(probability, st.integers(1, 12)), max_size=4).map(tuple)


def defined(how: DraftSettings, ranks: list[int], greedy: list[float], first: bool) -> list[int]:
    found, stopped = [], False
    for slot, (rank, p) in enumerate(zip(ranks, greedy, strict=True)):
        if first and slot == 0:
            found.append(min(next((cap for limit, cap in how.first_caps if p >= limit), how.beam), how.beam))
            continue
        stopped |= how.fan_out[rank] == 0
        found.append(0 if stopped else min([how.fan_out[rank], *(cap for limit, cap in how.other_caps if p >= limit)]))
    return found


@given(
    table=st.lists(st.integers(0, 10), min_size=4, max_size=4).map(tuple),
    first_caps=caps, other_caps=caps, beam=st.just(10), first=st.booleans(),
    slots=st.lists(st.tuples(st.integers(0, 3), probability), min_size=1, max_size=5),
)  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_it_is_the_table_the_caps_and_the_stop(table, first_caps, other_caps, beam, first, slots):
    how = DraftSettings(fan_out=table, first_caps=first_caps, other_caps=other_caps, beam=beam)
    ranks, greedy = ([slot[i] for slot in slots] for i in (0, 1))
    found = FanOutRule.of(how).fan_out(torch.tensor([[ranks]]), torch.tensor([[greedy]]), first)
    assert found[0, 0].tolist() == defined(how, ranks, greedy, first)

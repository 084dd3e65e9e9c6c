"""Batches: every window once an epoch, alike in length, the same after a resume."""

from __future__ import annotations

from itertools import islice

from specblock.drafter.batches import batches
from specblock.drafter.window import Window
from tests.drafter.helpers import random_window


def _windows() -> list[Window]:
    return [random_window(i, prompt_tokens=1 + 7 * i % 40, generated=4) for i in range(30)]


def test_an_epoch_takes_windows_once_and_sorts_what_it_batches() -> None:
    windows = _windows()
    found = list(islice(batches(windows, 4, 3, 0), 14))
    assert [len(batch) for batch in found] == [4] * 14
    for epoch in (found[:7], found[7:]):
        names = [w.conversation_id for batch in epoch for w in batch]
        assert len(set(names)) == 28, "two of thirty are left out"
    filled = sum(4 * max(len(w.tokens) for w in batch) for batch in found)
    needed = sum(len(w.tokens) for batch in found for w in batch)
    assert filled < 1.25 * needed, "batches of random lengths would be filled up by half"
    assert [[w.conversation_id for w in b] for b in found[:7]] != [[w.conversation_id for w in b] for b in found[7:]]


def test_copies_of_a_window_come_in_different_batches_and_few_windows_in_new_company() -> None:
    few = [random_window(i, prompt_tokens=1 + i, generated=4) for i in range(6)]
    windows = few * 4 + [random_window(9 + i, prompt_tokens=1 + i % 7, generated=4) for i in range(32)]
    for batch in islice(batches(windows, 8, 3, 0), 28):
        assert len({w.conversation_id for w in batch}) >= 6
    small = [random_window(i, prompt_tokens=1 + i, generated=4) for i in range(24)]
    found = [frozenset(w.conversation_id for w in batch) for batch in islice(batches(small, 8, 3, 0), 12)]
    assert len(set(found)) > 6


def test_a_resumed_order_goes_on_where_it_stopped() -> None:
    windows = _windows()
    whole = [[w.conversation_id for w in batch] for batch in islice(batches(windows, 4, 3, 0), 20)]
    for step in (1, 6, 7, 11):
        rest = [[w.conversation_id for w in batch] for batch in islice(batches(windows, 4, 3, step), 20 - step)]
        assert rest == whole[step:]


def test_few_windows_make_one_batch() -> None:
    assert [len(batch) for batch in islice(batches(_windows()[:3], 8, 1, 0), 2)] == [3, 3]

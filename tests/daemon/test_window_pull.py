"""How many windows travel to the trainer: `trainer.max_positions` bounds its memory."""

from __future__ import annotations

from specblock.daemon.actors import newest_within
from specblock.drafter.window import Window
from tests.drafter.helpers import random_window


def test_the_newest_windows_within_the_limit_and_always_one() -> None:
    windows: list[Window] = [random_window(i, 3, 8) for i in range(5)]
    assert newest_within(windows, 1000) == windows
    assert newest_within(windows, 30) == windows[2:]
    assert newest_within(windows, 29) == windows[3:]
    assert newest_within(windows, 1) == windows[4:]
    assert newest_within([], 1) == []

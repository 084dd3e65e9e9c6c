"""An update trains mostly on what it is made for, and never only on that."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from specblock.daemon.training_mix import MOST_REPEATS, REHEARSAL, mixed
from specblock.drafter.window import Window
from tests.drafter.helpers import random_window


def windows(**counts: int) -> list[Window]:
    made = []
    for domain, count in counts.items():
        for _ in range(count):
            n = len(made)
            made.append(replace(random_window(n), domain=domain, time_s=float(n), conversation_id=f"{domain}-{n}"))
    return made


def share(chosen: list[Window], domain: str) -> float:
    return sum(w.domain == domain for w in chosen) / len(chosen)


def test_a_new_kind_of_text_gets_most_of_the_training_though_it_has_few_windows() -> None:
    chosen = mixed(windows(python=60, cpp=20), {"cpp": 0.6})
    assert share(chosen, "cpp") == pytest.approx(0.75 + REHEARSAL * 20 / 80, abs=0.02)
    assert len(chosen) == 80
    repeats = Counter(w.conversation_id for w in chosen if w.domain == "cpp")
    assert len(repeats) == 20 and max(repeats.values()) <= MOST_REPEATS


def test_the_newest_are_kept_and_repeated_first() -> None:
    chosen = mixed(windows(python=60, cpp=20), {"cpp": 1.0})
    kept = sorted({w.time_s for w in chosen if w.domain == "python"})
    assert kept == [float(n) for n in range(60 - len(kept), 60)]
    counts = Counter(w.time_s for w in chosen if w.domain == "cpp")
    often = [time_s for time_s, count in counts.items() if count == max(counts.values())]
    assert max(counts) in often and min(often) > min(counts)


def test_few_windows_are_not_repeated_without_end() -> None:
    chosen = mixed(windows(python=100, cpp=2), {"cpp": 1.0})
    assert sum(w.domain == "cpp" for w in chosen) == 2 * MOST_REPEATS
    assert 20 <= sum(w.domain == "python" for w in chosen) <= 30


@pytest.mark.parametrize("weights", [{}, {"cpp": 0.0}, {"absent": 1.0}])
def test_without_a_wish_everything_is_taken_as_it_came(weights: dict[str, float]) -> None:
    made = windows(python=5, cpp=3)
    assert mixed(made, weights) == made


def test_weights_that_follow_the_windows_change_nothing_but_rounding() -> None:
    made = windows(python=30, cpp=10)
    assert [w.conversation_id for w in mixed(made, {"python": 3.0, "cpp": 1.0})] == [w.conversation_id for w in made]

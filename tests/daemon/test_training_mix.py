"""An update trains mostly on what it is made for, and never only on that."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from specblock.bandit.actions import Focus
from specblock.bandit.reach import MOST_REPEATS, REHEARSAL
from specblock.bandit.simulation.drafters import Conversations, training_mix
from specblock.cuda_ext.sampling import SamplingParams
from specblock.daemon.training_mix import hardest, mixed
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
    chosen = mixed(windows(python=60, cpp=20), {"cpp": Focus(weight=0.6)})
    assert share(chosen, "cpp") == pytest.approx(0.75 + REHEARSAL * 20 / 80, abs=0.02)
    assert len(chosen) == 80
    repeats = Counter(w.conversation_id for w in chosen if w.domain == "cpp")
    assert len(repeats) == 20 and max(repeats.values()) <= MOST_REPEATS


def test_what_is_rehearsed_is_of_the_kinds_that_need_no_update() -> None:
    focus = {
        "cpp": Focus(weight=1.0),
        "python": Focus(weight=0.0, rehearsed=3.0),
        "manual": Focus(weight=0.0, rehearsed=1.0),
    }
    chosen = mixed(windows(python=30, manual=30, cpp=60), focus)
    assert len(chosen) == 120 and share(chosen, "cpp") == pytest.approx(1 - REHEARSAL, abs=0.01)
    assert share(chosen, "python") == pytest.approx(REHEARSAL * 3 / 4, abs=0.01)
    assert share(chosen, "manual") == pytest.approx(REHEARSAL / 4, abs=0.01)


def test_the_newest_are_kept_and_repeated_first() -> None:
    chosen = mixed(windows(python=60, cpp=20), {"cpp": Focus(weight=1.0)})
    kept = sorted({w.time_s for w in chosen if w.domain == "python"})
    assert kept == [float(n) for n in range(60 - len(kept), 60)]
    counts = Counter(w.time_s for w in chosen if w.domain == "cpp")
    often = [time_s for time_s, count in counts.items() if count == max(counts.values())]
    assert max(counts) in often and min(often) > min(counts)


def test_few_windows_are_not_repeated_without_end() -> None:
    chosen = mixed(windows(python=100, cpp=2), {"cpp": Focus(weight=1.0)})
    assert sum(w.domain == "cpp" for w in chosen) == 2 * MOST_REPEATS
    assert 20 <= sum(w.domain == "python" for w in chosen) <= 30


@pytest.mark.parametrize("weights", [{}, {"cpp": 0.0}, {"absent": 1.0}])
def test_without_a_wish_everything_is_taken_as_it_came(weights: dict[str, float]) -> None:
    made = windows(python=5, cpp=3)
    assert mixed(made, {name: Focus(weight=weight) for name, weight in weights.items()}) == made


def test_weights_that_follow_the_windows_change_nothing_but_rounding() -> None:
    made = windows(python=30, cpp=10)
    chosen = mixed(made, {"python": Focus(weight=3.0), "cpp": Focus(weight=1.0)})
    assert [w.conversation_id for w in chosen] == [w.conversation_id for w in made]


def _served(made: list[Window], version: str, drafts: list[int]) -> list[Window]:
    """Ten cycles each, with so many accepted drafts in all of them."""
    return [replace(w, drafter_version=version, accepted=(d,) * 10) for w, d in zip(made, drafts, strict=True)]


def test_where_a_part_fell_its_hard_conversations_are_most_of_the_training() -> None:
    made = _served(windows(default=100), "v1", [0 if n % 3 == 0 else 2 for n in range(100)])
    chosen = mixed(made, {"default": Focus(weight=1.0, part=0.34)})
    hard = sum(w.accepted[0] == 0 for w in chosen)
    assert len(chosen) == 100 and hard == pytest.approx(75 + 25 / 3, abs=1)
    assert {w.conversation_id for w in made if w.accepted[0] == 0} <= {w.conversation_id for w in chosen}
    assert [w.time_s for w in chosen] == sorted(w.time_s for w in chosen)


def test_hardness_is_relative_to_the_version_that_served() -> None:
    made = windows(default=40)
    old = _served(made[:20], "v1", [1] * 10 + [0] * 10)  # all of these are slower than
    new = _served(made[20:], "v2", [5] * 10 + [2] * 10)  # these
    assert hardest([*old, *new], 0.5) == [*old[10:], *new[10:]]


def test_cycles_without_drafts_and_hotter_text_say_nothing_of_hardness() -> None:
    made = _served(windows(default=40), "v1", [1] * 10 + [2] * 20 + [0] * 10)
    drafted, plain = (7, 0), (0, 0)
    hard = [replace(w, plans=(drafted,) * 10) for w in made[:10]]
    easy = [replace(w, plans=(drafted,) * 5 + (plain,) * 5, accepted=(2,) * 5 + (0,) * 5) for w in made[10:30]]
    undrafted = [replace(w, plans=(plain,) * 10) for w in made[30:]]
    assert hardest([*hard, *easy, *undrafted], 0.25)[:10] == hard
    hot = [replace(w, sampling=SamplingParams(temperature=1.5), plans=(drafted,) * 10) for w in made[30:]]
    assert hardest([*hard, *easy, *hot], 0.25)[:10] == hard


def test_unknown_cycles_count_as_the_mean_and_few_windows_are_not_sifted() -> None:
    made = _served(windows(default=40), "v1", [0] * 20 + [2] * 20)
    made[0] = replace(made[0], accepted=())
    assert made[0] not in hardest(made, 0.2) and len(hardest(made, 0.2)) == 12, "never fewer than LEAST_PART"
    assert hardest(made[:8], 0.3) == made[:8]


@pytest.mark.parametrize("part", [0.1, 0.3, 0.6, 1.0])
def test_the_hardest_are_taken_as_the_trainer_takes_them(part: float) -> None:
    """The modelled mix against the daemon's own on the same conversations."""
    random = np.random.default_rng(4)
    kind = (random.uniform(size=200) < 0.3).astype(np.int64)
    cycles = np.clip(np.round(random.normal(20 + 8 * kind, 4)), 5, 60).astype(int)
    windows = [
        replace(
            random_window(0),
            conversation_id=f"c{n}",
            domain="default",
            time_s=float(n),
            drafter_version="v1",
            accepted=(1,) * int(60 - cycles[n]) + (0,) * int(2 * cycles[n] - 60)
            if cycles[n] >= 30
            else (60 // int(cycles[n]) - 1,) * int(cycles[n]),
        )
        for n in range(200)
    ]
    spent = np.array([len(w.accepted) / (len(w.accepted) + sum(w.accepted)) for w in windows])
    given = Conversations(domain=np.zeros(200, dtype=np.int64), kind=kind, hardness=spent)
    modelled = training_mix(given, 2, {0: Focus(weight=1.0, part=part)})
    chosen = [int(w.conversation_id[1:]) for w in mixed(windows, {"default": Focus(weight=1.0, part=part)})]
    assert kind[chosen].mean() == pytest.approx(modelled[1], abs=0.03)
    assert (kind[chosen].mean() > kind.mean() + 0.05) == (part < 1)

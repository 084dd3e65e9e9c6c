"""The fault detector."""

from __future__ import annotations

import numpy as np

from specblock.bandit.actions import ParityRow
from specblock.bandit.config import ParityConfig
from specblock.bandit.parity import judge

CONFIG = ParityConfig()


def rows(count: int, factor: float = 1.0, noise: float = 0.0, seed: int = 0) -> list[ParityRow]:
    random = np.random.default_rng(seed)
    found = []
    for i in range(count):
        replayed = int(random.integers(40, 60))
        live = max(1, round(replayed * factor * (1 + noise * random.normal())))
        found.append(ParityRow(conversation_id=f"c{i}", tokens=150, live_cycles=live, replay_cycles=replayed))
    return found


def test_an_exact_replay_is_ok() -> None:
    evidence = judge(rows(20), CONFIG)
    assert (evidence.verdict, evidence.difference, evidence.lower, evidence.upper) == ("ok", 0.0, 0.0, 0.0)


def test_a_small_consistent_gap_beyond_the_tolerance_is_broken() -> None:
    evidence = judge(rows(40, 1.06), CONFIG)
    assert evidence.verdict == "broken" and evidence.upper < 0
    assert evidence.live_acceptance < evidence.replay_acceptance


def test_better_than_replay_is_broken_too() -> None:
    assert judge(rows(40, 0.9), CONFIG).verdict == "broken"


def test_a_gap_within_the_tolerance_is_ok_however_certain() -> None:
    found = [ParityRow(conversation_id=str(i), tokens=3000, live_cycles=1005, replay_cycles=1000) for i in range(50)]
    evidence = judge(found, CONFIG)
    assert evidence.verdict == "ok" and evidence.upper < 0


def test_noise_is_not_taken_for_a_fault() -> None:
    broken = sum(judge(rows(30, noise=0.1, seed=seed), CONFIG).verdict == "broken" for seed in range(300))
    assert broken <= 12, "about one per cent, with a normal interval at 30 rows"


def test_too_little_is_said_to_be_too_little() -> None:
    for found in ([], rows(1, 2.0), rows(7, 2.0)):
        evidence = judge(found, CONFIG)
        assert evidence.verdict == "insufficient"
    short = [ParityRow(conversation_id=str(i), tokens=4, live_cycles=2, replay_cycles=1) for i in range(20)]
    assert judge(short, CONFIG).verdict == "insufficient"


def test_rows_without_cycles_are_left_out() -> None:
    empty = ParityRow(conversation_id="e", tokens=0, live_cycles=0, replay_cycles=0)
    assert judge([*rows(20), empty], CONFIG).conversations == 20

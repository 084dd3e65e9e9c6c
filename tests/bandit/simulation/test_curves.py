"""The modelled world's numbers, and what training makes of a drafter."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from specblock.bandit.actions import Focus
from specblock.bandit.codec import dumps
from specblock.bandit.reach import REHEARSAL
from specblock.bandit.simulation.curves import demo_curves, read_curves
from specblock.bandit.simulation.drafters import Conversations, Levels, after_update, training_mix
from tests.bandit.simulation.small import CURVES

KINDS = ("python", "cpp", "javascript")
KNOWN = Levels.of(CURVES, KINDS)
CPP = np.array([0.0, 1.0, 0.0])
MEASURED = np.array([REHEARSAL, 1 - REHEARSAL, 0.0])  # what updates of the break-even map train on, about


def test_the_demo_numbers_are_those_of_its_runs() -> None:
    full = after_update(KNOWN.base, "full", 1.0, MEASURED, 1.0, CURVES, KNOWN)
    assert full[1] == pytest.approx(2.05, abs=0.01), "breakeven: 1.68 to 2.05"
    lost = 1 - full[2] / KNOWN.base[2]
    assert lost == pytest.approx(0.005, abs=1e-6), "what updates for cpp cost python"
    head = after_update(KNOWN.base, "head", 1.0, MEASURED, 1.0, CURVES, KNOWN)
    assert head[1] == pytest.approx(1.84, abs=0.01), "breakeven: 1.68 to 1.84"
    trial = after_update(KNOWN.base, "full", 0.2, MEASURED, 1.0, CURVES, KNOWN)
    shown = (1 - KNOWN.base[1] / trial[1]) / (1 - KNOWN.base[1] / full[1])
    assert 0.54 < shown < 0.58, "breakeven: what trials of a fifth of the steps showed"
    assert CURVES.progress(0.0) == 0.0 and CURVES.progress(1.0) == pytest.approx(1.0)
    assert {"kinds", "arms.full", "arms.head", "cycle_s", "replay_s_per_token"} <= set(CURVES.origin)


def test_repeated_updates_saturate_and_forget_no_further_than_the_floor() -> None:
    levels = KNOWN.base
    for _ in range(200):
        levels = after_update(levels, "full", 1.0, CPP, 1.0, CURVES, KNOWN)
    assert levels[1] == pytest.approx(KNOWN.ceiling[1]) and (levels[[0, 2]] == KNOWN.floor[[0, 2]]).all()
    levels = KNOWN.base
    for _ in range(50):
        levels = after_update(levels, "head", 1.0, CPP, 1.0, CURVES, KNOWN)
    within_reach = KNOWN.base[1] + CURVES.arms["head"].reach * (KNOWN.ceiling[1] - KNOWN.base[1])
    assert levels[1] == pytest.approx(within_reach), "however often: a head cannot reach more"


def test_an_update_on_other_text_helps_in_proportion() -> None:
    half = after_update(KNOWN.base, "full", 1.0, np.array([0.5, 0.5, 0.0]), 1.0, CURVES, KNOWN)
    none = after_update(KNOWN.base, "full", 1.0, np.array([1.0, 0.0, 0.0]), 1.0, CURVES, KNOWN)
    assert none[1] < KNOWN.base[1] < half[1] < 2.02
    assert (after_update(KNOWN.base, "full", 0.0, CPP, 1.0, CURVES, KNOWN) == KNOWN.base).all()


def test_training_follows_weights_with_rehearsal_and_few_repeats() -> None:
    kind = np.array([0] * 90 + [1] * 10)
    given = Conversations(domain=kind, kind=kind, hardness=np.ones(100))
    assert training_mix(given, 2, {}).tolist() == [0.9, 0.1]
    # The new domain would get 77.5 of 100 places; ten conversations fill 40 of them at most.
    assert training_mix(given, 2, {1: Focus(weight=1.0)})[1] == pytest.approx(40 / 62.5)
    none = Conversations(domain=kind[:0], kind=kind[:0], hardness=np.ones(0))
    assert training_mix(none, 2, {}).tolist() == [0.5, 0.5]


def test_other_numbers_are_read_from_json() -> None:
    assert read_curves(dumps(CURVES)) == CURVES == demo_curves()
    other = json.loads(dumps(CURVES))
    other["arms"] = {"tiny": {"steps": 5, "train_s": 1.0, "gap_closed": 0.1}}
    assert read_curves(json.dumps(other)).arms["tiny"].reach == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cycle_s": 0.0}, "curves.cycle_s must be a finite number above 0"),
        (
            {"kinds": {"python": {"base": 2.0, "ceiling": 1.5}, "cpp": {"base": 2, "ceiling": 3}}},
            "kinds.python.ceiling",
        ),
        ({"kinds": {"python": {"base": 2.0, "ceiling": 2.5}}}, "curves.new must be one of python, got 'cpp'"),
        ({"usual": "cpp"}, "curves.new must be another kind"),
        (
            {"arms": {"full": {"steps": 40, "train_s": 1.0, "gap_closed": 1.5}}},
            "curves.arms.full.gap_closed must be between 0 and 1",
        ),
        ({"cycles": 1}, "unknown field 'cycles'"),
        ({"fault_loss": 1.0}, "curves.fault_loss"),
        ({"kept_windows": 1}, "curves.kept_windows must be at least 128"),
    ],
)
def test_bad_numbers_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        read_curves(json.dumps({**json.loads(dumps(CURVES)), **change}))


def test_a_change_of_one_number_is_one_change() -> None:
    assert replace(CURVES, luck_sd=0.0) != CURVES

"""A candidate is judged on the text that it was made for, and waits for it while nothing else needs an update."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from specblock.bandit.actions import Mix
from specblock.bandit.config import HorizonConfig
from specblock.bandit.service import BanditService
from tests.bandit.test_service import drive, make, records
from tests.bandit.world import World, small_policy

POLICY = small_policy(
    gate=replace(small_policy().gate, deadline_s=600.0), horizon=HorizonConfig(cap_s=7200.0, hazard_prior_s=7200.0)
)


def at_the_gate(tmp_path: Path) -> tuple[World, BanditService, float]:
    """Manual text fell, a candidate for it is trained, and it went away just then."""
    world, service = make(tmp_path, POLICY)
    world.rates["v1"]["manual"] = world.rates["v1"]["python"]
    now_s = drive(world, service, 1000, 60)
    now_s = drive(world, service, now_s, 60, "manual")
    world.shift("manual", 0.4)
    while service.status().stage != "gating":
        now_s = drive(world, service, now_s, 1, "manual")
    return world, service, now_s


def test_it_waits_for_its_text_and_then_serves(tmp_path: Path) -> None:
    world, service, now_s = at_the_gate(tmp_path)
    looks = world.calls.count("compare")
    now_s = drive(world, service, now_s, 200)
    assert service.status().stage == "gating" and world.calls.count("compare") - looks <= 1
    now_s = drive(world, service, now_s, 60, "manual")
    promoted = [r for r in records(tmp_path) if r.stage == "promoted"]
    assert promoted


def test_text_that_needs_an_update_ends_the_wait(tmp_path: Path) -> None:
    world, service, now_s = at_the_gate(tmp_path)
    world.shift("python", 0.3)
    world.rates[service.state.pending.candidate_version]["python"] = 0.3  # type: ignore[union-attr]
    for _ in range(120):
        now_s = drive(world, service, now_s, 1)
        ended = [r for r in records(tmp_path) if r.stage == "rejected"]
        if ended:
            break
    assert ended and "has gone and python fell" in ended[0].reason
    assert now_s < 1000 + 120 + 400, "long before the deadline"


def test_its_own_text_is_waited_for_whatever_else_falls(tmp_path: Path) -> None:
    world, service, now_s = at_the_gate(tmp_path)
    world.shift("python", 0.3)
    for _ in range(30):
        now_s = drive(world, service, drive(world, service, now_s, 1), 1, "manual")
    assert [r.stage for r in records(tmp_path) if r.stage in ("rejected", "promoted")] == ["promoted"]


def test_text_of_which_nothing_was_forecast_is_judged_too(tmp_path: Path) -> None:
    """It loses a third where it was not made for; that kind of text began to arrive only now."""
    world, service, now_s = at_the_gate(tmp_path)
    world.rates["v1"]["other"] = 0.85
    world.rates[service.state.pending.candidate_version]["other"] = 0.4  # type: ignore[union-attr]
    for _ in range(90):
        now_s = drive(world, service, drive(world, service, now_s, 3, "other"), 1, "manual")
    ended = next(r for r in records(tmp_path) if r.stage in ("rejected", "promoted"))
    assert ended.stage == "rejected" and "domain other" in ended.reason


def test_what_a_look_may_not_take_is_owed_to_the_next() -> None:
    mix, taken = Mix(meant=("cpp",), others=0.3), []
    for _ in range(10):
        now = ["python"] * 20 + ["cpp"] * 2
        taken += [now[i] for i in mix.after(taken).chosen(now)]
    assert taken.count("cpp") == 20 and taken.count("python") in (5, 6)


@pytest.mark.parametrize(("others", "expected"), [(0.0, [1, 4]), (1.0, [1, 3, 4, 5]), (9.0, [0, 1, 2, 3, 4, 5])])
def test_a_mix_takes_all_that_is_meant_and_the_newest_of_the_rest(others: float, expected: list[int]) -> None:
    domains = ["python", "cpp", "python", "manual", "cpp", "python"]
    assert Mix(meant=("cpp",), others=others).chosen(domains) == expected
    assert Mix(meant=("absent",), others=others).chosen(domains) == []

"""kill -9 at every kind of point: nothing is lost, learned twice or done twice.

A ``Crash`` is a BaseException, so no handler of the service sees it: the object is abandoned as a killed process would
be, and a new one is built from what is on disk, with the unacknowledged entries delivered again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specblock.bandit.config import Arm
from specblock.bandit.ledger import TERMINAL, Ledger, read_ledger
from specblock.bandit.memory_stream import MemoryLog, MemoryStream
from specblock.bandit.service import BanditService
from specblock.bandit.snapshot import SnapshotStore
from tests.bandit.world import TOKENS, World, service_config, small_policy

ACTIONS = ("windows", "versions", "parity", "train", "compare", "restore", "promote", "rollback", "discard")
STEPS, SHIFT_AT = 75, 16


class Crash(BaseException):
    """The process is killed here."""


class Fuse:
    """Counts the points passed and kills at one of them."""

    def __init__(self, at: int | None) -> None:
        self.at, self.passed, self.armed = at, 0, True

    def disarm(self) -> None:
        self.armed = False

    def point(self) -> None:
        if not self.armed:
            return
        self.passed += 1
        if self.passed - 1 == self.at:
            raise Crash


def guarded(fuse: Fuse, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with a point of death before and after it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        fuse.point()
        result = function(*args, **kwargs)
        fuse.point()
        return result

    return call


def traffic_shifts(world: World) -> None:
    """Training is the answer."""
    world.shift("python", 0.4)


def worse_version_serves(world: World) -> None:
    """Restoring the one before is the answer."""
    world.rates["v2-live"] = {"python": 0.4}
    world.serving = "v2-live"


def scenario(
    directory: Path, fuse: Fuse, patch: pytest.MonkeyPatch, happens: Callable[[World], None] = traffic_shifts
) -> tuple[World, BanditService, int]:
    """Something that happens to acceptance and the update it causes; returns the number of deaths too."""
    log = MemoryLog(clock=lambda: 0.0)
    world = World(MemoryStream(log, "engine"))
    for name in ACTIONS:
        setattr(world, name, guarded(fuse, getattr(world, name)))
    patch.setattr(SnapshotStore, "save", guarded(fuse, SnapshotStore.save))
    patch.setattr(Ledger, "append", guarded(fuse, Ledger.append))
    patch.setattr(MemoryStream, "ack", guarded(fuse, MemoryStream.ack))
    policy, config = small_policy(), service_config(directory)
    policy = replace(policy, arms=(*policy.arms, Arm(name="restore", restores=True)))
    service, deaths = BanditService(MemoryStream(log), world, policy, config), 0
    for step in range(STEPS):
        now_s = 1000.0 + step
        if step == SHIFT_AT:
            happens(world)
        for i in range(3):
            world.serve("python", now_s + i / 4)
        try:
            service.step(now_s + 0.9)
        except Crash:
            deaths += 1
            service._ledger._file.close()
            service = BanditService(MemoryStream(log), world, policy, config)
    fuse.disarm()
    service.step(1000.0 + STEPS + 20.0)
    return world, service, deaths


def check(directory: Path, world: World, service: BanditService) -> None:
    sent = world.sequence
    assert service.state.learned == sent
    versions = service.state.domains["python"].versions.values()
    assert sum(v.total_tokens for v in versions) == sent * TOKENS
    assert sum(v.requests for v in versions) == sent
    assert service.state.watermarks.lost == 0 and service.state.watermarks.missing == 0
    assert len(set(world.outside)) == len(world.outside), "an action was done twice under one decision"
    stages = [(r.decision_id, r.stage) for r in read_ledger(directory / "ledger.jsonl")]
    assert len(set(stages)) == len(stages)
    acted = {decision for decision, _ in world.outside}
    pending = service.state.pending.decision_id if service.state.pending else ""
    for decision in acted - {pending}:
        ends = [stage for key, stage in stages if key == decision and stage in TERMINAL - {"closed"}]
        assert len(ends) == 1, f"{decision} ended {ends}"
    service._ledger.close()


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many points of death an undisturbed run passes."""
    fuse, patch = Fuse(None), pytest.MonkeyPatch()
    directory = tmp_path_factory.mktemp("undisturbed")
    world, service, deaths = scenario(directory, fuse, patch)
    patch.undo()
    assert deaths == 0
    check(directory, world, service)
    assert any(action == "promote" for _, action in world.outside), "the scenario must go all the way"
    return fuse.passed


@pytest.mark.parametrize("part", range(4))
def test_killed_anywhere_a_restore_happens_once_and_ends_once(
    part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fuse = Fuse(None)
        world, service, _ = scenario(tmp_path / "undisturbed", fuse, patch, worse_version_serves)
    check(tmp_path / "undisturbed", world, service)
    assert "restore" in world.calls and world.serving == "v1" and not any("train" in call for call in world.calls)
    for at in range(13 * part, fuse.passed, 13 * 4):
        with monkeypatch.context() as patch:
            world, service, deaths = scenario(tmp_path / str(at), Fuse(at), patch, worse_version_serves)
        assert deaths == 1
        check(tmp_path / str(at), world, service)


PARTS = 8


@pytest.mark.parametrize("part", range(PARTS))
def test_killed_anywhere_nothing_is_lost_learned_twice_or_done_twice(
    part: int, points: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 13 is coprime to the two points of every guarded call, so the sample walks through all kinds of them.
    for at in range(13 * part, points, 13 * PARTS):
        with monkeypatch.context() as patch:
            directory = tmp_path / str(at)
            world, service, deaths = scenario(directory, Fuse(at), patch)
        assert deaths == 1
        check(directory, world, service)


def test_an_interrupted_training_is_charged_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MemoryLog(clock=lambda: 0.0)
    world = World(MemoryStream(log, "engine"))
    train = world.train

    def killed(*args: Any, **kwargs: Any) -> Any:
        train(*args, **kwargs)
        raise Crash

    world.train = killed  # type: ignore[method-assign]
    policy, config = small_policy(), service_config(tmp_path)
    service = BanditService(MemoryStream(log), world, policy, config)
    with pytest.raises(Crash):
        for step in range(60):
            if step == SHIFT_AT:
                world.shift("python", 0.4)
            for i in range(3):
                world.serve("python", 1000.0 + step + i / 4)
            service.step(1000.9 + step)
    service._ledger._file.close()
    decision_id = world.outside[0][0]
    world.train = train  # type: ignore[method-assign]
    again = BanditService(MemoryStream(log), world, policy, config)
    again.step(2000.0)
    record = [r for r in read_ledger(tmp_path / "ledger.jsonl") if r.decision_id == decision_id][-1]
    assert record.stage == "abandoned" and "interrupted" in record.reason
    assert record.charged_s > 0 and again.status().balance.charged_s >= record.charged_s
    assert again.state.pending is None and len(world.outside) == 1


def test_a_lost_newest_snapshot_falls_back_and_the_ledger_prevents_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        world, service, _ = scenario(tmp_path, Fuse(None), patch)
    decisions = service.state.policy.decisions
    service._ledger.close()
    newest = max((tmp_path / "snapshots").glob("*.snap"))
    newest.write_bytes(newest.read_bytes()[:-10])
    again = BanditService(MemoryStream(MemoryLog(clock=lambda: 0.0)), world, small_policy(), service_config(tmp_path))
    assert again.state.policy.decisions >= decisions, "a decision number is never used twice"
    assert again.state.learned > 0
    again.close(3000.0)

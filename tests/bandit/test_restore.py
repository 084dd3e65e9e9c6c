"""The arm that brings an earlier version back: what it expects, what it does, and what it never does again."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from specblock.bandit.actions import CompareReport, Focus, SwapReport, TrainReport
from specblock.bandit.config import Arm, PolicyConfig
from specblock.bandit.context import build_context
from specblock.bandit.decision import PROBE, SKIP, PastLevel
from specblock.bandit.explain import explain
from specblock.bandit.forecast import complete_value, domain_gain
from specblock.bandit.learning import learn_gain
from specblock.bandit.ledger import LedgerRecord
from specblock.bandit.memory_stream import MemoryLog, MemoryStream
from specblock.bandit.past import past_gain
from specblock.bandit.policy import decide
from specblock.bandit.reach import targets
from specblock.bandit.service import BanditService
from specblock.bandit.what_if import what_if
from tests.bandit.test_policy import CONTEXT, DOMAIN, HEAD, at, checked, saving
from tests.bandit.test_service import drive, records
from tests.bandit.world import World, service_config, small_policy

RESTORE = Arm(name="restore", restores=True, prior_gain_sd=0.005, probe_gain_share=1.0, probe_gain_share_sd=0.01)
CONFIG = PolicyConfig(arms=(Arm(name="skip"), RESTORE, HEAD))


def past(version: str, drop: float, drop_se: float = 0.01) -> PastLevel:
    return PastLevel(version=version, drop=drop, drop_se=drop_se)


def test_the_version_that_was_best_here_is_tried_and_costs_no_training() -> None:
    levels = (past("v0", 0.1), past("v3", 0.28), past("v2", -0.1))
    context = replace(at(past=levels), stored=("v0", "v3", "v2"))
    decision, _ = decide(context, checked(), CONFIG)
    option = decision.option()
    assert decision.action == PROBE and decision.arm == "restore" and option is not None
    assert option.version == "v3" and option.value.gain == pytest.approx(0.28)
    assert option.value.train_s == option.value.probe_s == 0.0 < option.value.score_s
    assert "restore of v3" in decision.reason


def test_what_is_not_told_from_noise_is_hardly_a_gain_and_a_loss_is_a_loss() -> None:
    levels = (past("v0", 0.08, 0.05), past("v2", -0.02, 0.05), past("v4", 0.01, 0.001))
    context = replace(at(past=levels), stored=("v0", "v2", "v4"))
    (target,) = targets(context, CONFIG)
    assert 0.0 < domain_gain(RESTORE, target, checked(), CONFIG, "v0").mean < 0.005
    assert domain_gain(RESTORE, target, checked(), CONFIG, "v2").mean == -0.02
    assert domain_gain(RESTORE, target, checked(), CONFIG, "v4").mean == 0.0  # below min_drop, however sure


@pytest.mark.parametrize(("z", "share", "wide"), [(2.0, 0.076, 1.2), (3.0, 0.5, 1.6), (4.0, 0.97, 1.4)])
def test_a_difference_is_weighed_against_being_the_largest_of_many(z: float, share: float, wide: float) -> None:
    level = past("v0", z * 0.02, 0.02)
    (target,) = targets(replace(at(past=(level,)), stored=("v0",)), CONFIG)
    gain = past_gain(level, target, CONFIG)
    assert gain.mean == pytest.approx(share * level.drop, rel=0.01)
    # Where either may be true, the interval reaches from one to the other.
    assert gain.sd > wide * level.drop_se


def test_what_is_expected_of_an_earlier_version_grows_with_what_it_had_without_a_step() -> None:
    (target,) = targets(at(), CONFIG)
    means = [past_gain(past("v0", 0.031 + 0.001 * n, 0.02), target, CONFIG).mean for n in range(80)]
    steps = [b - a for a, b in itertools.pairwise(means)]
    assert all(0 < step < 0.003 for step in steps)


def test_of_a_version_that_never_served_here_what_the_drop_promises_is_expected() -> None:
    context = replace(at(past=()), stored=("v0",), base="v0")
    value = complete_value(RESTORE, context, checked(), CONFIG, "v0")
    assert value.gain == pytest.approx(RESTORE.drop_recovery * DOMAIN.drop)
    # That it gained nothing there is learned, for the next one of which nothing is known; not where a level was known.
    (target,) = targets(context, CONFIG)
    learned = learn_gain(checked(), RESTORE, (target,), saving(0.0), CONFIG, 0.0, version="v0")
    assert complete_value(RESTORE, context, learned, CONFIG, "v0").gain < 0.5 * value.gain
    known = replace(target, past=(past("v0", 0.2),))
    assert (
        learn_gain(checked(), RESTORE, (known,), saving(0.0), CONFIG, 0.0, version="v0").arms["restore"].gain.count == 0
    )


def test_without_an_earlier_version_there_is_nothing_to_choose() -> None:
    decision, _ = decide(CONTEXT, checked(), CONFIG)
    assert [option.value.arm for option in decision.options] == ["head"]
    alone, _ = decide(CONTEXT, checked(), replace(CONFIG, arms=(Arm(name="skip"), RESTORE)))
    assert alone.action == SKIP and "no earlier version to restore" in alone.reason


def test_training_conversations_are_not_needed_held_out_ones_are() -> None:
    levels = (past("v0", 0.28),)
    decision, _ = decide(replace(at(past=levels, num_train=1), stored=("v0",)), checked(), CONFIG)
    assert decision.arm == "restore"
    decision, _ = decide(replace(at(past=levels, num_heldout=1), stored=("v0",)), checked(), CONFIG)
    assert decision.action == SKIP and "held-out" in decision.options[0].blocked


def test_an_arm_restores_or_trains() -> None:
    with pytest.raises(ValueError, match="steps must be 0"):
        Arm(name="restore", restores=True, steps=3)
    with pytest.raises(ValueError, match="patterns must be empty"):
        Arm(name="restore", restores=True, patterns=("*",))


class Forgetful(World):
    """Training for a kind of text costs what the drafter knew of the other."""

    def train(
        self,
        decision_id: str,
        arm: Arm,
        base_version: str,
        fraction: float,
        resume: bool,
        focus: Mapping[str, Focus],
    ) -> TrainReport:
        report = super().train(decision_id, arm, base_version, fraction, resume, focus)
        meant = max(focus, key=lambda name: focus[name].weight)
        base = self.rates[base_version]
        part = 1.0 if resume else 0.5
        self.rates[report.candidate_version] = {
            name: rate + part * ((0.8 - rate) if name == meant else min(0.0, 0.45 - rate))
            for name, rate in base.items()
        }
        return report


def served(tmp_path: Path) -> tuple[Forgetful, BanditService, int]:
    """Python, then manual, for which the drafter is trained."""
    stream = MemoryStream(MemoryLog(clock=lambda: 0.0))
    world = Forgetful(stream, rates={"v1": {"python": 0.85, "manual": 0.4}})
    policy = small_policy(arms=(Arm(name="skip"), replace(RESTORE, cooldown_s=5.0), replace(HEAD, cooldown_s=5.0)))
    service = BanditService(stream, world, policy, service_config(tmp_path))
    now_s = drive(world, service, 1000, 60)
    now_s = drive(world, service, now_s, 150, "manual")
    assert world.serving.endswith("-live")
    return world, service, now_s


def taken(tmp_path: Path) -> list[LedgerRecord]:
    return [r for r in records(tmp_path) if r.stage == "decided" and r.arm == "restore"]


def test_traffic_that_comes_back_is_served_by_the_version_that_was_best_for_it(tmp_path: Path) -> None:
    world, service, now_s = served(tmp_path)
    learned_manual, trainings = world.serving, sum(call.startswith("train") for call in world.calls)
    now_s = drive(world, service, now_s, 150)
    assert world.serving == "v1"
    now_s = drive(world, service, now_s, 150, "manual")
    assert world.serving == learned_manual
    assert sum(call.startswith("train") for call in world.calls) == trainings, "nothing was trained for it"
    back, again = taken(tmp_path)
    assert back.options[0].version == "v1" and again.options[0].version == learned_manual
    stages = [r.stage for r in records(tmp_path) if r.decision_id == back.decision_id]
    assert [s for s in stages if not s.startswith("gat")] == [
        *("decided", "scoring", "probed", "promoting", "promoted", "verifying", "verified"),
        *("settling", "settled", "closed"),
    ]
    settled = next(r for r in records(tmp_path) if (r.decision_id, r.stage) == (back.decision_id, "settled"))
    assert settled.numbers["saving"] > 0.2 and settled.candidate_version == "v1"
    assert "restore of v1" in explain(back)
    assert "v1" not in service.state.policy.barred_until_s
    model = what_if(lambda: iter(records(tmp_path)), service._policy).modelled
    assert model.dropped == 0


def test_a_restored_version_that_loses_is_taken_back_and_what_it_lost_is_known(tmp_path: Path) -> None:
    world, service, now_s = served(tmp_path)
    trained, restore = world.serving, world.restore

    def spoiled(decision_id: str, version: str) -> SwapReport:
        world.rates[version] = dict.fromkeys(world.rates[version], 0.2)
        return restore(decision_id, version)

    world.restore = spoiled  # type: ignore[method-assign]
    drive(world, service, now_s, 300)
    assert [record.options[0].version for record in taken(tmp_path)].count("v1") == 1, "its loss is remembered"
    assert "rollback" in world.calls and world.serving != "v1"
    assert service.state.policy.barred_until_s == {}, "it was no fault"
    known = [c for c in service.state.policy.comparisons if (c.version, c.against) == ("v1", trained)]
    assert next(c for c in known if c.domain == "python").saving < -0.3


def test_a_restored_version_that_is_broken_live_is_kept_away_for_a_day(tmp_path: Path) -> None:
    world, service, now_s = served(tmp_path)
    restore = world.restore

    def breaks(decision_id: str, version: str) -> SwapReport:
        world.broken = True
        return restore(decision_id, version)

    def mended(decision_id: str, to_version: str) -> SwapReport:
        world.broken = False
        return rollback(decision_id, to_version)

    rollback = world.rollback
    world.restore, world.rollback = breaks, mended  # type: ignore[method-assign]
    now_s = drive(world, service, now_s, 200)
    (until_s,) = service.state.policy.barred_until_s.values()
    assert set(service.state.policy.barred_until_s) == {"v1"} and until_s > now_s + 80_000.0
    assert len(taken(tmp_path)) == 1


def test_a_version_that_cannot_be_compared_makes_room_for_the_next_best(tmp_path: Path) -> None:
    world, service, now_s = served(tmp_path)
    compare = world.compare

    def damaged(old_version: str, new_version: str, after_time_s: float | None) -> CompareReport:
        if new_version == "v1":
            raise OSError("a file is damaged")
        return compare(old_version, new_version, after_time_s)

    world.compare = damaged  # type: ignore[method-assign]
    for second in range(now_s, now_s + 120):
        world.serve("python", float(second))
        service.step(second + 0.9)
    tried = [record.options[0].version for record in taken(tmp_path)]
    assert tried.count("v1") == 1 and set(service.state.policy.barred_until_s) == {"v1"}


def test_the_base_is_compared_once_on_text_that_it_has_not_served(tmp_path: Path) -> None:
    world, service, now_s = served(tmp_path)
    trained = world.serving
    world.rates["v1"]["prose"], world.rates[trained]["prose"] = 0.93, 0.84
    now_s = drive(world, service, now_s, 120, "prose")
    assert world.serving == "v1"
    (found,) = taken(tmp_path)
    assert found.options[0].version == "v1" and found.options[0].curiosity > 0 and found.options[0].value.net_lower <= 0
    assert "nothing is known of v1" in found.reason


def test_what_a_comparison_found_is_remembered_until_it_is_old(tmp_path: Path) -> None:
    world, service, now_s = served(tmp_path)
    trained = world.serving
    world.rates["v1"]["prose"], world.rates[trained]["prose"] = 0.5, 0.84
    now_s = drive(world, service, now_s, 200, "prose")
    assert world.serving == trained
    (found,) = taken(tmp_path)
    assert [r.stage for r in records(tmp_path) if r.decision_id == found.decision_id][-1] == "abandoned"
    (known,) = [c for c in service.state.policy.comparisons if c.domain == "prose"]
    assert (known.version, known.against) == ("v1", trained) and known.saving < -0.1
    contexts = [
        build_context(service.state, world.windows(), trained, known.time_s + passed_s, CONFIG, stored=("v1", trained))
        for passed_s in (10.0, CONFIG.evidence_half_life_s + 10.0)
    ]
    levels = [next(d for d in context.domains if d.domain == "prose").past for context in contexts]
    assert [level.drop for level in levels[0]] == [known.saving] and levels[1] == ()


def test_versions_that_serve_or_were_taken_back_are_not_offered(tmp_path: Path) -> None:
    world, service, now_s = served(tmp_path)
    state, serving = service.state, world.serving
    context = build_context(state, world.windows(), serving, float(now_s), CONFIG, stored=("v1", "v9", serving))
    assert context.stored == ("v1", "v9")
    (manual,) = [d for d in context.domains if d.domain == "manual"]
    assert [level.version for level in manual.past] == ["v1"], "of v9 nothing is known"
    assert manual.past[0].drop < -0.2, "it was worse there"
    assert context.base == "v1"
    state.policy = replace(state.policy, barred_until_s={"v1": now_s + 10.0})
    context = build_context(state, world.windows(), serving, float(now_s), CONFIG, stored=("v1", serving))
    assert context.stored == () and context.base == "" and all(d.past == () for d in context.domains)
    context = build_context(state, world.windows(), serving, now_s + 11.0, CONFIG, stored=("v1", serving))
    assert context.stored == ("v1",), "not for ever"

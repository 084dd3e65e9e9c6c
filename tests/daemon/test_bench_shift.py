"""Policies on recorded text: the traffic, a world with real drafters and training, and what is made of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from specblock.bandit.config import PolicyConfig
from specblock.bandit.parity import judge
from specblock.bandit.simulation.baselines import EveryN, Never
from specblock.bandit.simulation.run import drive
from specblock.bandit.simulation.scenario import START_S
from specblock.daemon.app import app
from specblock.daemon.bench_breakeven_stage import Sizes, Stage
from specblock.daemon.cli_replay import rule
from specblock.daemon.config import DaemonConfig
from specblock.daemon.config_loader import load_config
from specblock.daemon.shift_curves import curves
from specblock.daemon.shift_live import LivePhase, live_lines, live_rows
from specblock.daemon.shift_recording import Pools, record, requests_per_s
from specblock.daemon.shift_rows import PolicyRun, lines, shift_rows
from specblock.daemon.shift_traffic import PhasePlan, ShiftTraffic, make_shift
from specblock.daemon.shift_world import RecordedWorld
from specblock.drafter.replay import replay

PLAN = PhasePlan(domains=("a", "b", "a"), phase_s=1000.0, requests_per_s=0.5, heldout_fraction=0.25)
CYCLE_S = 0.02


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    texts = ("import os\n\ndef main(", "class Node:\n    def __init__(self", "for line in sys.stdin:\n")
    for side in ("train", "heldout"):
        made = [json.dumps({"domain": "python", "prompt": text}) for text in texts]
        (folder / f"python.{side}.jsonl").write_text("\n".join(made) + "\n")
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DaemonConfig:
    state = tmp_path_factory.mktemp("state")
    return load_config(Path("configs/demo.yaml"), ["target.dtype=float32", f"state_dir={state}"])


@pytest.fixture(scope="module")
def rules(config: DaemonConfig) -> PolicyConfig:
    policy = rule(config)
    arms = (policy.arm("skip"), replace(policy.arm("head"), steps=3, cooldown_s=0.0))
    return replace(policy, arms=arms, min_train_windows=1)


@pytest.fixture(scope="module")
def sizes(prompts: Path) -> Sizes:
    return Sizes(prompts=prompts, domains=("python",), conversations=4, heldout=5, tokens=24)


@pytest.fixture(scope="module")
def pools(config: DaemonConfig, rules: PolicyConfig, sizes: Sizes, tmp_path_factory: pytest.TempPathFactory) -> Pools:
    return record(config, rules, sizes, tmp_path_factory.mktemp("recording"), lambda line: None)[0]


@pytest.fixture
def bench(config: DaemonConfig, rules: PolicyConfig, sizes: Sizes, tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(config, rules, sizes, tmp_path / "registry")
    yield stage
    stage.host.close()


def python_traffic(pools: Pools, fault_at: float = 2.0) -> ShiftTraffic:
    plan = replace(PLAN, domains=("python",), phase_s=200.0, fault_at=fault_at)
    return make_shift(plan, {"python": len(pools.heldout["python"])}, {"python": len(pools.train["python"])})


def test_traffic_follows_its_phases_and_serves_only_held_out_text() -> None:
    plan = replace(PLAN, phase_s=20_000.0)
    traffic = make_shift(plan, {"a": 7, "b": 3}, {"a": 5, "b": 2})
    assert traffic.domains == ("a", "b") and traffic.end_s == START_S + 60_000
    assert (np.diff(traffic.time_s) >= 0).all()
    assert np.array_equal(traffic.phase, ((traffic.time_s - START_S) / 20_000).astype(int))
    assert np.array_equal(traffic.domain, traffic.phase % 2)
    for domain, held, train in ((0, 7, 5), (1, 3, 2)):
        mine = traffic.domain == domain
        half = held // 2
        assert traffic.num_served[domain] == half and set(traffic.served[mine]) == set(range(half))
        # Judged by the other half, trained on what is apart from both.
        assert set(traffic.kept[mine]) == {*(-1 - n for n in range(half, held)), *range(train)}
    count = len(traffic.time_s)
    assert abs(count - 30_000) < 5 * 30_000**0.5
    assert abs((traffic.kept < 0).mean() - 0.25) < 5 * (0.25 * 0.75 / count) ** 0.5
    again, other = (make_shift(replace(plan, seed=s), {"a": 7, "b": 3}, {"a": 5, "b": 2}) for s in (0, 1))
    assert np.array_equal(again.served, traffic.served) and not np.array_equal(other.time_s[:9], traffic.time_s[:9])


def test_what_serves_is_what_was_trained_judged_and_swapped_in(bench: Stage, pools: Pools, rules: PolicyConfig) -> None:
    world = RecordedWorld(bench, pools, python_traffic(pools), rules.cost, CYCLE_S)
    world.serve_until(START_S + 100)
    assert world.served > 20 and world.free_s == START_S
    first = dict(zip(world.traffic.served[: world.served].tolist(), world.cycles.tolist(), strict=False))
    assert first == {i: len(pools.base["python"][i]) for i in first}
    parity = judge(world.parity(bench.base).rows, replace(rules.parity, min_rows=2, min_cycles=4))
    assert parity.verdict == "ok" and parity.difference == 0.0
    report = world.train("d000001", rules.arm("head"), bench.base, 1.0, False, {})
    assert world.trainings == 1 and report.positions > 0
    compared = world.compare(bench.base, report.candidate_version, None)
    spent = report.device_s * (1 + rules.cost.interference) + compared.device_s
    assert world.free_s > START_S + 100 + report.device_s + compared.device_s
    assert world.charged_s > spent and world.charged_s - spent < 5, "and the parity check"
    before_s = world.charged_s
    swap = world.promote("d000001", report.candidate_version)
    assert world.serving_version() == swap.version != bench.base
    assert world.charged_s == pytest.approx(before_s + swap.stall_s * rules.cost.serving_devices)
    begun = world.served
    world.serve_until(world.end_s)
    replayed = replay(bench.drafter, [replace(w, plans=()) for w in pools.heldout["python"]])
    expected = {row.conversation_id: row.cycles for row in replayed}
    assert {row.conversation_id: row.cycles_new for row in compared.rows}.items() <= expected.items()
    for number in range(begun, world.served):
        name = pools.heldout["python"][int(world.traffic.served[number])].conversation_id
        assert expected[name] == world.cycles[number]
        assert world.event(number).drafter_version == swap.version
    event = world.event(0)
    assert sum(event.accepted_histogram) == event.cycles == len(pools.base["python"][int(world.traffic.served[0])])
    assert sum((a + 1) * n for a, n in enumerate(event.accepted_histogram)) == event.committed_tokens
    world.rollback("d000001", bench.base)
    assert world.serving_version() == bench.base


def test_a_slipped_cache_is_seen_by_parity_alone(
    bench: Stage, config: DaemonConfig, rules: PolicyConfig, sizes: Sizes, tmp_path: Path
) -> None:
    # A few conversations more: in some a slipped cache accepts as much by chance.
    pools = record(config, rules, replace(sizes, heldout=16), tmp_path / "recording", lambda line: None)[0]
    world = RecordedWorld(bench, pools, python_traffic(pools, fault_at=0.0), rules.cost, CYCLE_S)
    world.serve_until(START_S + 100)
    rows = world.parity(bench.base).rows
    assert sum(row.live_cycles for row in rows) > sum(row.replay_cycles for row in rows)
    replayed = {w.conversation_id: len(a) for w, a in zip(pools.heldout["python"], pools.base["python"], strict=True)}
    assert {row.conversation_id: row.replay_cycles for row in rows}.items() <= replayed.items()


def test_policies_are_driven_through_the_same_traffic(bench: Stage, pools: Pools, rules: PolicyConfig) -> None:
    traffic = python_traffic(pools)
    idle = RecordedWorld(bench, pools, traffic, rules.cost, CYCLE_S)
    drive(idle, Never(idle, rules), 20.0)
    assert idle.charged_s == 0 and idle.served == len(traffic.time_s)
    busy = RecordedWorld(bench, pools, traffic, rules.cost, CYCLE_S)
    drive(busy, EveryN(busy, rules, "head", 30), 20.0)
    assert busy.updates >= 1 and busy.tokens == idle.tokens and busy.charged_s > 0
    assert idle.serving_s == pytest.approx(idle.request_s.sum())
    tokens = sum(pools.heldout["python"][i].num_generated for i in traffic.served)
    assert idle.tokens == tokens


def test_live_runs_accept_what_the_replay_says(bench: Stage, pools: Pools, rules: PolicyConfig) -> None:
    plan = replace(PLAN, domains=("python", "python"), phase_s=100.0)
    count = {"python": len(pools.heldout["python"])}
    traffic = make_shift(plan, count, {"python": len(pools.train["python"])})
    world = RecordedWorld(bench, pools, traffic, rules.cost, CYCLE_S, live=8)
    drive(world, EveryN(world, rules, "head", 30), 20.0)
    assert [one.phase for one in world.live_phases] == [0, 1]
    first, second = world.live_phases
    assert first.conversations == second.conversations == traffic.num_served[0] and first.tokens == second.tokens
    assert second.version == world.serving_version() != bench.base
    assert first.differ == second.differ == 0 and min(first.live_s, second.live_s) > 0
    mine = world.request_s[traffic.phase == 1], traffic.served[traffic.phase == 1]
    newest = {int(n): float(s) for s, n in zip(*mine, strict=True)}
    assert second.replayed_s == pytest.approx(sum(newest.values()), rel=0.01)


def test_live_and_replay_are_compared_with_every_cost_charged() -> None:
    traffic = make_shift(PLAN, {"a": 14, "b": 8}, {"a": 5, "b": 2})
    count = len(traffic.time_s)

    def phases(live_s: float, replayed_s: float) -> list[LivePhase]:
        same = {"domain": "a", "version": "v", "conversations": 2, "tokens": 20, "differ": 1}
        return [LivePhase(phase=n, live_s=live_s, replayed_s=replayed_s, **same) for n in range(3)]

    measured = {("static", 0): (phases(4.0, 2.0), 0.0), ("cost_aware", 0): (phases(2.0, 1.0), count * 0.1)}
    idle, own = live_rows(measured, {0: traffic}, "static")
    assert (idle.ratio, idle.replayed_ratio) == (1.0, 1.0) and own.differ == 3
    assert own.ratio == pytest.approx(2.0 / 1.1) and own.replayed_ratio == pytest.approx(1.0 / 0.6)
    assert own.s_per_token == pytest.approx(0.1) and own.replayed_s_per_token == pytest.approx(0.05)
    [_, line] = live_lines([idle, own])
    assert "1.818 x static, by replay 1.667 (+9.1%)" in line and "3 of 6" in line


def test_arrivals_keep_the_device_as_busy_as_asked(pools: Pools) -> None:
    per_request_s = CYCLE_S * np.mean([len(accepted) for accepted in pools.base["python"]])
    assert requests_per_s(pools, CYCLE_S, 0.5) * per_request_s == pytest.approx(0.5)


def made_run(
    policy: str, traffic: ShiftTraffic, cycles_by_phase: dict[int, tuple[int, int]], charged_s: float
) -> PolicyRun:
    """16 tokens in the cycles of the first and second half of each phase."""
    cycles = np.zeros(len(traffic.time_s), dtype=np.int64)
    for phase, (early, late) in cycles_by_phase.items():
        where = np.flatnonzero(traffic.phase == phase)
        cycles[where] = np.where(np.arange(len(where)) < len(where) // 2, early, late)
    return PolicyRun(
        policy=policy,
        seed=0,
        tokens=16 * len(cycles),
        request_s=0.01 * cycles,
        cycles=cycles,
        committed=np.full(len(cycles), 16),
        charged_s=charged_s,
        updates=1,
        trainings=2,
        rollbacks=0,
        faults=None,
        wall_s=1.0,
    )


def test_rows_charge_everything_and_measure_recovery_against_the_best_plateau() -> None:
    traffic = make_shift(PLAN, {"a": 14, "b": 8}, {"a": 5, "b": 2})
    flat, fallen = (8, 8), (16, 16)
    static = made_run("static", traffic, {0: flat, 1: fallen, 2: flat}, 0.0)
    better = made_run("better", traffic, {0: flat, 1: (16, 8), 2: flat}, 3.0)
    rows = {row.policy: row for row in shift_rows([static, better], {0: traffic}, "static")}
    own = rows["better"]
    assert rows["static"].ratio_to_static == 1.0 and rows["static"].ratio_interval == (1.0, 1.0)
    assert rows["static"].recovery_requests is None and rows["static"].recovered == 0.0
    assert own.net_tokens_per_s == pytest.approx(better.tokens / (better.request_s.sum() + 3.0))
    assert own.ratio_to_static == pytest.approx(static.total_s / better.total_s)
    low, high = own.ratio_interval
    assert low < own.ratio_to_static < high
    assert own.acceptance_by_phase[0] == own.acceptance_by_phase[2] == 2.0
    half = (traffic.phase == 1).sum() // 2
    assert own.recovered == 1.0 and own.recovery_requests is not None
    assert half < own.recovery_requests <= half + 64, "as soon as the last 64 requests show it"
    table = list(lines(list(rows.values())))
    assert len(table) == 4 and "better" in table[2]
    bound = rows["oracle"]
    assert bound.acceptance_by_phase == (2.0, 2.0, 2.0) and bound.acceptance_length == pytest.approx(2.0)
    assert bound.net_tokens_per_s == pytest.approx(200.0) and bound.ratio_to_static > own.ratio_to_static


def test_conversations_are_drawn_alike_whatever_a_run_happened_to_serve() -> None:
    one, other = (make_shift(replace(PLAN, seed=seed), {"a": 40, "b": 6}, {"a": 5, "b": 2}) for seed in (0, 1))
    made = [
        replace(made_run(name, own, {0: (8, 8), 1: (16, late), 2: (8, 8)}, 0.0), seed=seed)
        for seed, own in enumerate((one, other))
        for name, late in (("static", 16), ("better", 8))
    ]
    [_, row, _] = shift_rows(made, {0: one, 1: other}, "static")
    assert row.ratio_interval[0] <= row.ratio_to_static <= row.ratio_interval[1]


def test_curves_end_at_the_final_balance() -> None:
    traffic = make_shift(PLAN, {"a": 14, "b": 8}, {"a": 5, "b": 2})
    static = made_run("static", traffic, {0: (8, 8), 1: (16, 16), 2: (8, 8)}, 0.0)
    better = made_run("better", traffic, {0: (8, 8), 1: (16, 8), 2: (8, 8)}, 3.0)
    better = replace(better, charges=((START_S + 1200.0, 1.0), (START_S + 1600.0, 2.0)), promoted_s=(START_S + 1500.0,))
    idle, own = curves([static, better], traffic, "static", intervals=30)
    assert set(idle.balance_s) == {0.0} and own.promoted_hours == (1500 / 3600,)
    assert own.balance_s[-1] == pytest.approx(static.total_s - better.total_s)
    assert own.balance_s[9] == 0.0 and own.balance_s[13] == -1.0 < own.balance_s[15]
    assert own.acceptance[0] == 2.0 and own.acceptance[11] == 1.0 and own.acceptance[18] == 2.0
    assert own.hours[-1] == pytest.approx(3000 / 3600)


def test_the_command_writes_figures_and_page(prompts: Path, tmp_path: Path) -> None:
    asked = ["--phase", "python", "--conversations", "3", "--heldout", "3", "--tokens", "24", "--hours", "0.05"]
    chosen = ["--policy", "static", "--policy", "dual_ema", "--out", str(tmp_path), "--json"]
    made = CliRunner().invoke(app, ["bench", "shift", "--prompts", str(prompts), *asked, *chosen])
    assert made.exit_code == 0, made.output
    result = json.loads((tmp_path / "shift.json").read_text())
    assert [row["policy"] for row in result["rows"]] == ["static", "dual_ema", "oracle"]
    assert result["rows"][0]["ratio_to_static"] == 1.0 and result["facts"]["phase_hours"] == 0.05
    assert result["rows"][0]["net_tokens_per_s"] > 0 and len(result["curves"]) == 2
    assert [row["policy"] for row in result["live"]] == ["static"] and result["live"][0]["differ"] == 0
    page = (tmp_path / "shift.html").read_text()
    assert "<svg" in page and "dual_ema" in page and "http" not in page.split("<svg")[0]
    assert "Served again by a real engine" in page and "+0.0%" in page


def test_missing_prompts_and_unknown_policies_are_named(prompts: Path, tmp_path: Path) -> None:
    missing = CliRunner().invoke(app, ["bench", "shift", "--prompts", str(tmp_path)])
    assert missing.exit_code == 3 and "python.train.jsonl" in missing.output
    asked = ["--phase", "python", "--conversations", "2", "--heldout", "2", "--tokens", "24", "--prompts", str(prompts)]
    unknown = CliRunner().invoke(app, ["bench", "stationary", *asked, "--policy", "static", "--policy", "nevr"])
    assert unknown.exit_code == 2 and "nevr" in unknown.output and "cost_aware" in unknown.output
    alone = CliRunner().invoke(app, ["bench", "fault", *asked, "--policy", "dual_ema"])
    assert alone.exit_code == 2 and "static" in alone.output

"""``specblockd replay`` on a ledger that the real service wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specblock.bandit.memory_stream import MemoryLog, MemoryStream
from specblock.bandit.service import BanditService
from specblock.daemon.app import app
from specblock.daemon.cli_replay import NOT_REPRODUCED, rule
from specblock.daemon.config_loader import load_config
from specblock.daemon.errors import ExitCode
from tests.bandit.test_service import drive
from tests.bandit.world import World, service_config

POLICY = """
target: {model: none}
drafter: {path: none}
adaptation:
  min_heldout_conversations: 4
  arms: [{name: head, patterns: ["*head*"], steps: 20, learning_rate: 1e-3, prior_s_per_position: 1e-5}]
  policy:
    min_train_windows: 8
    parity: {min_rows: 6, min_cycles: 60, valid_s: 30.0, retry_s: 5.0, every_s: 100.0}
    statistics: {reference_cycles: 150, min_window_cycles: 80, window_events: 24, rate_half_life_s: 30.0}
"""


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``policy.yaml`` and the ledger of a run under it, through a shift."""
    directory = tmp_path_factory.mktemp("replay")
    (directory / "policy.yaml").write_text(POLICY)
    policy = rule(load_config(directory / "policy.yaml"))
    world = World(MemoryStream(MemoryLog(clock=lambda: 0.0)))
    service = BanditService(world.stream, world, policy, service_config(directory))
    now_s = drive(world, service, 1000, 30)
    world.shift("python", 0.4)
    drive(world, service, now_s, 40)
    service.close(now_s + 41.0)
    return directory


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["replay", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_its_own_policy_reproduces_a_ledger(run_directory: Path) -> None:
    ledger, policy = str(run_directory / "ledger.jsonl"), str(run_directory / "policy.yaml")
    code, out, _ = run(ledger, "-c", policy)
    assert code == ExitCode.OK and "reproduced bit for bit" in out and "NOT" not in out
    code, out, _ = run(ledger, "-c", policy, "--json")
    found = json.loads(out)
    assert code == ExitCode.OK and found["reproduced"] == found["decisions"] == len(found["each"]) > 10


def test_a_decision_that_does_not_come_out_the_same_is_named_and_ends_with_1(
    run_directory: Path, tmp_path: Path
) -> None:
    lines = (run_directory / "ledger.jsonl").read_text().splitlines()
    place = next(n for n, line in enumerate(lines) if json.loads(line)["action"] == "skip")
    skip = json.loads(lines[place])
    lines[place] = json.dumps({**skip, "verdict": "fault"})
    (tmp_path / "ledger.jsonl").write_text("\n".join(lines) + "\n")
    code, out, _ = run(str(tmp_path / "ledger.jsonl"), "-c", str(run_directory / "policy.yaml"))
    assert code == NOT_REPRODUCED
    wrong = [line for line in out.splitlines() if "NOT reproduced" in line]
    assert len(wrong) == 1 and wrong[0].startswith(skip["decision_id"]) and "verdict came out" in wrong[0]


def test_the_wrong_policy_is_pointed_out(run_directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(POLICY + "  horizon_s: 77.0\n")
    code, out, _ = run(str(run_directory / "ledger.jsonl"), "-c", str(other))
    assert code == NOT_REPRODUCED and "name its policy with --config" in out.splitlines()[-1]


def test_another_policy_shows_what_it_would_do_and_calls_its_balance_modelled(
    run_directory: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(POLICY + "  horizon_s: 0.01\n")
    ledger = str(run_directory / "ledger.jsonl")
    code, out, _ = run(ledger, "--policy", str(other))
    assert code == ExitCode.OK
    assert "recorded probe head, other.yaml skip" in out and "    other.yaml: acceptance of python" in out
    assert "recorded (measured)" in out and "(modelled)" in out and "nobody measured those" in out
    found = json.loads(run(ledger, "--policy", str(other), "--json")[1])
    assert found["modelled"]["kept"] == 0 and found["modelled"]["net_s"] <= 0 and found["differences"]


def test_missing_and_broken_ledgers_are_one_line(run_directory: Path, tmp_path: Path) -> None:
    policy = str(run_directory / "policy.yaml")
    code, out, err = run(str(tmp_path / "none.jsonl"), "-c", policy)
    assert (code, out, len(err.splitlines())) == (ExitCode.DEPENDENCY, "", 1) and "no such ledger" in err
    broken = tmp_path / "ledger.jsonl"
    broken.write_bytes(b"\xff\xfe garbage\n" + (run_directory / "ledger.jsonl").read_bytes())
    for more in ((), ("--policy", policy)):
        code, out, err = run(str(broken), "-c", policy, *more)
        assert (code, out, len(err.splitlines())) == (ExitCode.VERIFICATION, "", 1)
        assert "ledger.jsonl:1: unreadable record" in err
    code, _, err = run(str(run_directory / "ledger.jsonl"), "-c", str(tmp_path / "none.yaml"))
    assert code == ExitCode.CONFIG and "no such file" in err

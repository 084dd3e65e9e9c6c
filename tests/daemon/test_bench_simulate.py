"""``specblockd bench simulate``: the table, its labels and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specblock.bandit.codec import dumps
from specblock.bandit.simulation.curves import demo_curves
from specblock.daemon.app import app
from specblock.daemon.errors import ExitCode

POLICY = "target: {model: none}\ndrafter: {path: none}\n"


@pytest.fixture
def policy(tmp_path: Path) -> str:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return str(path)


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["bench", "simulate", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_table_is_labelled_modelled(policy: str) -> None:
    code, out, _ = run("-c", policy, "--scenario", "stationary", "--hours", "0.2")
    assert code == ExitCode.OK and "All numbers are modelled" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("stationary  ")]
    names = [row[1] for row in rows]
    assert names == [
        *(
            "never",
            "always_statistics",
            "always_head",
            "always_full",
            "every_80",
            "every_400",
            "every_1600",
            "dual_ema",
        ),
        *("without_model", "without_residual", "cost_aware", "oracle"),
    ]
    assert rows[0][4] == "0.0" and rows[-1][7] == "0.0%"


def test_the_usual_policy_has_a_curve_for_every_arm() -> None:
    code, out, _ = run("--scenario", "stationary", "--hours", "0.1")
    assert code == ExitCode.OK and "rule of configs/demo.yaml" in out


def test_json_holds_every_run_and_where_the_numbers_come_from(policy: str) -> None:
    code, out, err = run("-c", policy, "--scenario", "fault", "--seeds", "2", "--hours", "0.2", "--json")
    found = json.loads(out)
    assert code == ExitCode.OK and found["modelled"] is True and "fault:" in err
    assert {o["seed"] for o in found["outcomes"]} == {0, 1} and len(found["outcomes"]) == 2 * len(found["rows"])
    assert "breakeven.json" in found["curves"]["origin"]["seconds"]


def test_other_curves_are_used_and_bad_ones_refused(policy: str, tmp_path: Path) -> None:
    fitted = tmp_path / "curves.json"
    fitted.write_text(dumps(demo_curves()).replace('"cycle_s":0.0132', '"cycle_s":0.0264'))
    code, out, _ = run("-c", policy, "--scenario", "stationary", "--hours", "0.1", "--curves", str(fitted))
    never = next(line for line in out.splitlines() if line.startswith("stationary  never"))
    assert code == ExitCode.OK and str(fitted) in out and float(never.split()[2]) == pytest.approx(88.4, rel=0.05)
    fitted.write_text("{}")
    code, _, err = run("-c", policy, "--curves", str(fitted))
    assert code == ExitCode.CONFIG and "field 'kinds' is missing" in err and str(fitted) in err
    code, _, err = run("-c", policy, "--curves", str(tmp_path / "none.json"))
    assert code == ExitCode.CONFIG and "No such file" in err


def test_an_unknown_scenario_or_arm_is_one_line(policy: str, tmp_path: Path) -> None:
    code, _, err = run("-c", policy, "--scenario", "sudden")
    assert code == ExitCode.CONFIG and "there are abrupt, slow, recurring" in err and len(err.splitlines()) == 1
    other = tmp_path / "other.yaml"
    other.write_text(POLICY + "adaptation: {arms: [{name: tiny, patterns: ['*'], steps: 1, learning_rate: 0.1}]}\n")
    code, _, err = run("-c", str(other))
    assert code == ExitCode.CONFIG and "'tiny' has no learning curve" in err and len(err.splitlines()) == 1


def test_processes_share_the_runs_and_change_nothing(policy: str) -> None:
    found = []
    for jobs in ("1", "2"):
        code, out, err = run("-c", policy, "--scenario", "abrupt", "--hours", "0.1", "--jobs", jobs, "--json")
        assert code == ExitCode.OK, err
        found.append(json.loads(out))
    assert found[0]["outcomes"] and found[0] == found[1]

"""A complete, tiny measurement on the demo models: what is judged is what would serve, and nothing is left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specblock.daemon.app import app
from specblock.daemon.bench_breakeven_measure import run
from specblock.daemon.bench_breakeven_stage import Sizes
from specblock.daemon.cli_replay import rule
from specblock.daemon.config_loader import load_config

CONFIG = Path("configs/demo.yaml")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    texts = ("import os\n\ndef main(", "class Node:\n    def __init__(self", "for line in sys.stdin:\n", "x = [")
    for side in ("train", "heldout"):
        made = [json.dumps({"domain": "python", "prompt": text}) for text in texts]
        (tmp_path / f"python.{side}.jsonl").write_text("\n".join(made) + "\n")
    return tmp_path


def test_one_arm_is_trained_judged_stored_and_swapped_in(prompts: Path) -> None:
    config = load_config(CONFIG, ["target.dtype=float32", f"state_dir={prompts / 'state'}"])
    policy = rule(config)
    short = replace(policy.arm("head"), steps=5)
    policy = replace(policy, arms=(policy.arm("skip"), short))
    sizes = Sizes(prompts=prompts, domains=("python",), conversations=4, heldout=3, tokens=12)
    said: list[str] = []
    measured = run(config, policy, sizes, said.append)
    [update] = measured.updates
    assert (update.domain, update.arm) == ("python", "head")
    assert update.probe.positions > 0 and update.rest.positions == 4 * update.probe.positions, "1 of 5 steps, then 4"
    assert len(update.final.rows) == 3 and update.served_as_judged == 1.0
    assert update.stall_s > 0 and update.publish_s > 0 and update.score_s > 0
    served = measured.served
    assert (served.num_train, served.num_heldout) == ({"python": 4}, {"python": 3})
    assert update.final.cycle_s_old == update.final.cycle_s_new == served.cycle_s > 0
    assert served.parity.difference == 0.0 and served.live_cycle_s > 0
    # The base's acceptance is the live one, and replay needs the same cycles.
    assert sum(row.cycles_old for row in update.final.rows) == sum(row.live_cycles for row in update.final.rows)
    assert update.accepted[0] == served.acceptance["python"] >= 1
    assert not (prompts / "state").exists(), "the daemon's own versions are not touched"


def test_missing_prompts_are_named_before_anything_is_loaded(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "breakeven", "--prompts", str(tmp_path), "--domain", "cpp"])
    assert result.exit_code == 3 and "cpp.train.jsonl" in result.output

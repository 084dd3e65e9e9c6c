"""The planted cache desynchronisation through the whole daemon: reported as a fault, nothing trained."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import yaml

from specblock.bandit.decision import FAULT
from specblock.bandit.ledger import read_ledger
from specblock.daemon.demo import DemoSettings, run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(280)]


def test_desynchronised_cache_is_a_fault_and_trains_nothing(tmp_path: Path) -> None:
    policy = yaml.safe_load(Path("configs/demo.yaml").read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        policy["http"]["port"] = probe.getsockname()[1]
    policy["state_dir"] = str(tmp_path / "state")
    # The whole policy stays as shipped; only places differ.
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(policy))
    said: list[str] = []
    settings = DemoSettings(
        config=tmp_path / "demo.yaml", out=tmp_path / "out", traffic=16, most=48, fresh=2, fault=True
    )
    assert run(settings, said.append) == 0, "\n".join(said)
    records = list(read_ledger(tmp_path / "state" / "fault" / "bandit" / "ledger.jsonl"))
    fault = next(r for r in records if r.verdict == FAULT)
    assert "live acceptance" in fault.reason and "replay" in fault.reason, fault.reason

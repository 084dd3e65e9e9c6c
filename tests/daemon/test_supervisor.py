"""`serve` refuses before anything is started: no Redis, no Ray, no files of a half-started daemon."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from specblock.daemon import supervisor
from specblock.daemon.config import DaemonConfig
from specblock.daemon.config_loader import parse_config
from specblock.daemon.errors import ConfigError, DependencyError


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("must not be reached")

    monkeypatch.setattr(supervisor.ray, "init", refuse)
    monkeypatch.setattr(supervisor.RedisServer, "start", refuse)


def config(folder: Path, target: Path, drafter: Path, port: int) -> DaemonConfig:
    return parse_config(
        f"""
state_dir: {folder}/state
target: {{model: {target}}}
drafter: {{path: {drafter}}}
ray: {{dashboard: false}}
http: {{port: {port}}}
""",
        "test.yaml",
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_missing_model_directories(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"target\.model: no model at"):
        supervisor.serve(config(tmp_path, tmp_path / "none", tmp_path / "none", free_port()))
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"drafter\.path: no model at"):
        supervisor.serve(config(tmp_path, tmp_path / "target", tmp_path / "none", free_port()))


def test_port_in_use(tmp_path: Path) -> None:
    for name in ("target", "drafter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(DependencyError, match="cannot listen on"):
            supervisor.serve(config(tmp_path, tmp_path / "target", tmp_path / "drafter", taken.getsockname()[1]))

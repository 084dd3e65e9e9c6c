"""`serve` refuses before anything is started: no Redis, no Ray, no files of a half-started daemon."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from specblock.daemon import models, supervisor
from specblock.daemon.config import DaemonConfig
from specblock.daemon.config_loader import parse_config
from specblock.daemon.errors import ConfigError, DependencyError
from specblock.drafter.precision import fast_bfloat16


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


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_settled_once_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fast: bool, dtype: torch.dtype
) -> None:
    for name in ("target", "drafter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    measured: list[torch.device] = []
    received: list[DaemonConfig] = []

    class Recorded:
        def __init__(self, config: DaemonConfig, *_: object) -> None:
            received.append(config)

        async def run(self) -> int:
            return 0

    def measure(device: torch.device) -> bool:
        measured.append(device)
        return fast

    monkeypatch.setattr(models, "fast_bfloat16", measure)
    monkeypatch.setattr(supervisor.RedisServer, "start", lambda self: None)
    monkeypatch.setattr(supervisor, "_start_ray", received.append)
    monkeypatch.setattr(supervisor, "_Daemon", Recorded)
    asked = config(tmp_path, tmp_path / "target", tmp_path / "drafter", free_port())
    assert asked.target.dtype == "auto"
    with caplog.at_level("INFO"):
        assert supervisor.serve(asked) == 0
    assert measured == [torch.device("cpu")] and len(received) == 2
    assert {models.dtype_of(each) for each in received} == {dtype}
    assert f"{received[0].target.dtype} on cpu (target.dtype: auto)" in caplog.text


def test_auto_on_a_gpu_and_a_named_format_need_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    assert models.serving_dtype("auto", "cuda:1") == "bfloat16"
    monkeypatch.setattr(models, "fast_bfloat16", lambda device: pytest.fail("measured"))
    assert models.serving_dtype("float64", "cpu") == "float64"


def test_the_measurement_leaves_the_thread_count_alone() -> None:
    threads = torch.get_num_threads()
    assert isinstance(fast_bfloat16(torch.device("cpu")), bool)
    assert torch.get_num_threads() == threads


def test_port_in_use(tmp_path: Path) -> None:
    for name in ("target", "drafter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(DependencyError, match="cannot listen on"):
            supervisor.serve(config(tmp_path, tmp_path / "target", tmp_path / "drafter", taken.getsockname()[1]))

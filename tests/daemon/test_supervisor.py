"""`serve` refuses before anything is started: no Redis, no Ray, no files of a half-started daemon."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch

from specblock.cuda_ext.linear import rounds_rows
from specblock.daemon import models, supervisor
from specblock.daemon.config import DaemonConfig
from specblock.daemon.config_loader import parse_config
from specblock.daemon.errors import ExitCode, FailedCheckError, SpecblockError
from specblock.daemon.state_lock import own_state_dir
from specblock.drafter import precision
from specblock.drafter.precision import NumberFormat, fast_bfloat16, number_format, serves_faster_in_bfloat16

TARGET, DRAFTER = Path("models/demo-target"), Path("models/demo-drafter")


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("must not be reached")

    monkeypatch.setattr(supervisor.ray, "init", refuse)
    monkeypatch.setattr(supervisor.RedisServer, "start", refuse)


def config(folder: Path, target: Path = TARGET, drafter: Path = DRAFTER, port: int | None = None) -> DaemonConfig:
    return parse_config(
        f"""
state_dir: {folder}/state
target: {{model: {target}}}
drafter: {{path: {drafter}}}
ray: {{dashboard: false}}
http: {{port: {port or free_port()}}}
""",
        "test.yaml",
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def refused(policy: DaemonConfig) -> tuple[str, int]:
    """The one line that the daemon ends with, and its exit code."""
    with pytest.raises(SpecblockError) as caught:
        supervisor.serve(policy)
    (line,) = str(caught.value).splitlines()
    return line, int(caught.value.exit_code)


def test_missing_model_directories(tmp_path: Path) -> None:
    with pytest.raises(FailedCheckError) as caught:
        supervisor.serve(config(tmp_path, tmp_path / "none", tmp_path / "void"))
    assert str(caught.value).splitlines() == [
        f"target.model: {tmp_path}/none: no such directory",
        f"drafter.path: {tmp_path}/void: no such directory; `specblockd train` makes one",
    ]
    assert caught.value.exit_code == ExitCode.INCOMPATIBLE
    assert not (tmp_path / "state" / "drafters").exists()


def test_an_unreadable_tokenizer_is_found_before_anything_starts(tmp_path: Path) -> None:
    shutil.copytree(TARGET, tmp_path / "target")
    (tmp_path / "target" / "tokenizer.json").write_text("{")
    line, code = refused(config(tmp_path, tmp_path / "target"))
    assert line.startswith("target.model: the tokenizer of ") and code == ExitCode.INCOMPATIBLE


def test_a_state_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    line, code = refused(config(tmp_path))
    assert line == f"state_dir: {tmp_path}/state cannot be used: File exists" and code == ExitCode.CONFIG


def test_a_full_disk_while_the_drafter_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/x")

    monkeypatch.setattr(supervisor.DrafterRegistry, "import_base", full)
    assert refused(config(tmp_path)) == ("state_dir: /x: No space left on device", ExitCode.CONFIG)


def test_a_second_daemon_touches_nothing(tmp_path: Path) -> None:
    half_written = tmp_path / "state" / "drafters" / ".tmp-000001"
    half_written.mkdir(parents=True)
    with own_state_dir(tmp_path / "state"):
        line, code = refused(config(tmp_path))
        assert line.endswith(f"is used by another daemon (process {os.getpid()})") and code == ExitCode.DEPENDENCY
    assert half_written.exists(), "the first daemon may be in the middle of writing it"
    with own_state_dir(tmp_path / "state"):
        pass  # released


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_ray_starts_ends_the_start_cleanly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr(supervisor.RedisServer, "start", lambda self: None)
    monkeypatch.setattr(supervisor, "_start_ray", lambda config: signal.raise_signal(number))
    monkeypatch.setattr(supervisor, "_Daemon", lambda *_: pytest.fail("must not be reached"))
    assert supervisor.serve(config(tmp_path)) == 0
    assert signal.getsignal(number) is before


def test_the_reason_an_actor_did_not_start() -> None:
    text = "The actor died\n  File x\nspecblock.daemon.errors.IncompatibleError: the drafter is for another target"
    error = supervisor._start_error("engine", text)
    assert str(error) == "the engine did not start: the drafter is for another target"
    assert error.exit_code == ExitCode.INCOMPATIBLE
    other = supervisor._start_error("engine", "RuntimeError: CUDA error: no device\n")
    assert str(other) == "the engine did not start: RuntimeError: CUDA error: no device"
    assert other.exit_code == ExitCode.DEPENDENCY


@pytest.mark.parametrize(("fast", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_settled_once_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fast: bool, dtype: str
) -> None:
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

    monkeypatch.setattr(models, "serves_faster_in_bfloat16", measure)
    monkeypatch.setattr(supervisor.RedisServer, "start", lambda self: None)
    monkeypatch.setattr(supervisor, "_start_ray", received.append)
    monkeypatch.setattr(supervisor, "_Daemon", Recorded)
    asked = config(tmp_path)
    assert asked.target.dtype == "auto"
    with caplog.at_level("INFO"):
        assert supervisor.serve(asked) == 0
    assert measured == [torch.device("cpu")] and len(received) == 2
    assert {each.target.dtype for each in received} == {dtype}
    half = NumberFormat(torch.float32, coarse=True) if rounds_rows() else NumberFormat(torch.bfloat16)
    assert {models.format_of(each) for each in received} == {half if fast else NumberFormat(torch.float32)}
    assert f"{received[0].target.dtype} on cpu (target.dtype: auto)" in caplog.text


def test_auto_on_a_gpu_and_a_named_format_need_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    assert models.serving_dtype("auto", "cuda:1") == "bfloat16"
    monkeypatch.setattr(models, "serves_faster_in_bfloat16", lambda device: pytest.fail("measured"))
    assert models.serving_dtype("float64", "cpu") == "float64"


def test_bfloat16_on_a_cpu_is_native_products_where_it_multiplies_such_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for rounds, cpu in ((True, NumberFormat(torch.float32, coarse=True)), (False, NumberFormat(torch.bfloat16))):
        monkeypatch.setattr(precision, "rounds_rows", lambda rounds=rounds: rounds)
        assert number_format("bfloat16", "cpu") == cpu
        assert number_format("bfloat16", "cuda:0") == NumberFormat(torch.bfloat16)
        assert number_format("float32", "cpu") == NumberFormat(torch.float32)


def test_the_measurement_leaves_the_thread_count_alone() -> None:
    threads = torch.get_num_threads()
    for measured in (fast_bfloat16, serves_faster_in_bfloat16):
        measured.cache_clear()
        assert isinstance(measured(torch.device("cpu")), bool)
    assert torch.get_num_threads() == threads


def test_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        line, code = refused(config(tmp_path, port=taken.getsockname()[1]))
    assert "http.port" in line and "cannot be used" in line and code == ExitCode.DEPENDENCY

"""The command line: what is printed where, and with which exit code it ends."""

from __future__ import annotations

import http.server
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specblock.bandit.ledger import Ledger, LedgerRecord
from specblock.daemon.app import app
from specblock.daemon.config import LoggingConfig
from specblock.daemon.environment import prepare_environment
from specblock.daemon.errors import ExitCode
from specblock.daemon.logs import JsonFormatter, configure_logging
from specblock.daemon.registry import BASE_VERSION, DrafterRegistry
from specblock.daemon.runfile import DaemonInfo, write_run_file

RUNNER = CliRunner()
ADAPTATION = {"enabled": False, "reason": "the reason"}


@pytest.fixture
def policy(tmp_path: Path) -> str:
    path = tmp_path / "policy.yaml"
    path.write_text(
        f"state_dir: {tmp_path}/state\ntarget: {{model: {tmp_path}/none}}\ndrafter: {{path: {tmp_path}/none}}\n"
        "http: {api_key: key-of-the-test}\n"
    )
    (tmp_path / "state").mkdir()
    return str(path)


def run(*arguments: str) -> tuple[int, str, str]:
    result = RUNNER.invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_version() -> None:
    code, out, _ = run("version", "--json")
    assert code == ExitCode.OK and json.loads(out)["version"]


@pytest.mark.parametrize("command", [("serve",), ("check",), ("generate", "x"), ("status",), ("explain",), ("ledger",)])
def test_config_errors_end_every_command_with_2(tmp_path: Path, command: tuple[str, ...]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("target: {modl: x}\nhttp: {port: 0}\n")
    code, out, err = run(*command, "-c", str(path))
    assert code == ExitCode.CONFIG and out == ""
    assert err.splitlines() == [
        f"{path}:1:1: target.model: required, but not given",
        f"{path}:1:1: drafter: required, but not given",
        f"{path}:1:10: target.modl: unknown key; did you mean model?",
        f"{path}:2:14: http.port: Input should be greater than or equal to 1 (got 0)",
    ]


def test_check_reports_all_and_ends_with_the_first_error(policy: str) -> None:
    code, out, _ = run("check", "-c", policy, "--json")
    report = json.loads(out)
    assert code == report["exit_code"] == ExitCode.INCOMPATIBLE
    assert [each["name"] for each in report["findings"]][:3] == ["state_dir", "target", "drafter"]
    code, out, _ = run("check", "-c", policy, "--set", "state_dir=/dev/null/x")
    assert code == ExitCode.CONFIG and out.startswith("error   state_dir")


def test_generate_without_a_target(policy: str) -> None:
    code, _, err = run("generate", "hello", "-c", policy)
    assert code == ExitCode.INCOMPATIBLE and "no such directory" in err


def test_generate_refuses_bad_sampling(policy: str) -> None:
    code, _, err = run("generate", "hello", "-c", policy, "--top-p", "2")
    assert code == ExitCode.CONFIG and "top_p" in err


def test_a_wrong_option_ends_with_2() -> None:
    assert run("check", "--bogus")[0] == ExitCode.CONFIG


class _Daemon(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        allowed = self.headers.get("authorization") == "Bearer key-of-the-test"
        engine = {
            **{"phase": "ready", "detail": "", "drafter_version": "v1", "speculation": True, "running": 1},
            **{"waiting": 2, "slots": 8, "cycles": 10, "accepted_tokens": 15, "prompt_tokens": 3},
            **{"generation_tokens": 25, "windows": 4, "window_bytes": 1000},
        }
        about = {"version": "9", "model": "m", "dtype": "float32"}
        body = json.dumps(
            {**about, "engine": engine, "adaptation": ADAPTATION, "bandit": {"backlog": 3, "x": {}}}
        ).encode()
        self.send_response(200 if allowed and self.path == "/specblock/status" else 401)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keeps the test's output quiet."""


@pytest.fixture
def daemon(tmp_path: Path, policy: str) -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Daemon) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        write_run_file(tmp_path / "state", DaemonInfo(pid=os.getpid(), url=url, version="9", started_at_unix_s=0.0))
        yield url
        server.shutdown()
        thread.join()


def test_status_of_a_running_daemon(policy: str, daemon: str) -> None:
    code, out, _ = run("status", "-c", policy)
    assert code == ExitCode.OK
    assert "2.50 tokens per cycle" in out and "1 running, 2 waiting, 8 slots" in out
    assert "m in float32" in out
    assert "adaptation  backlog: 3" in out and "adaptation  off: the reason" in out and daemon in out
    code, out, _ = run("status", "-c", policy, "--json")
    assert json.loads(out)["engine"]["phase"] == "ready"
    code, _, err = run("status", "-c", policy, "--set", "http.api_key=another-key")
    assert code == ExitCode.DEPENDENCY and "401" in err and "another-key" not in err


def test_status_without_a_daemon(policy: str, tmp_path: Path) -> None:
    code, _, err = run("status", "-c", policy)
    assert code == ExitCode.DEPENDENCY and "no daemon is running" in err
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    info = DaemonInfo(pid=ended.pid, url="http://127.0.0.1:1", version="9", started_at_unix_s=0.0)
    write_run_file(tmp_path / "state", info)
    assert "is gone" in run("status", "-c", policy)[2]
    (tmp_path / "state" / "daemon.json").write_text("{")
    assert "cannot be read" in run("status", "-c", policy)[2]


def test_explain_and_ledger(policy: str, tmp_path: Path) -> None:
    code, _, err = run("explain", "-c", policy)
    assert code == ExitCode.DEPENDENCY and "no ledger yet" in err
    path = tmp_path / "state" / "bandit" / "ledger.jsonl"
    ledger = Ledger(path)
    assert run("explain", "-c", policy)[:2] == (ExitCode.OK, "nothing has been decided yet\n")
    for number in range(3):
        ledger.append(
            LedgerRecord(
                decision_id=f"d{number:06d}",
                stage="decided",
                time_s=float(number),
                action="skip",
                reason="acceptance has not fallen",
                charged_s=0.5,
            )
        )
    ledger.close()
    code, out, _ = run("explain", "2", "-c", policy)
    assert code == ExitCode.OK
    assert [line.partition(":")[0] for line in out.splitlines()] == ["d000001", "d000002"]
    assert "acceptance has not fallen" in out.lower()
    code, out, _ = run("ledger", "-c", policy, "--json")
    found = json.loads(out)
    assert (found["decisions"], found["skips"], found["charged_s"], found["net_s"]) == (3, 3, 1.5, -1.5)
    path.write_bytes(b"garbage\n" + path.read_bytes())
    assert run("ledger", "-c", policy)[0] == ExitCode.VERIFICATION


def test_explain_says_that_a_drafter_without_weights_cannot_adapt(policy: str) -> None:
    lookup = ("--set", "drafter.kind=prompt_lookup", "--set", "drafter.path=null")
    expected = "the drafter has no weights; nothing to adapt"
    assert run("explain", "-c", policy, *lookup)[:2] == (ExitCode.OK, f"{expected}\n")
    assert json.loads(run("explain", "-c", policy, *lookup, "--json")[1]) == [expected]


def test_the_demo_refuses_a_drafter_without_weights(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("target: {model: m}\ndrafter: {kind: prompt_lookup}\n")
    code, _, err = run("demo", "-c", str(tmp_path / "p.yaml"))
    assert code == ExitCode.CONFIG and err.startswith("drafter.kind: prompt_lookup cannot be demonstrated: ")


def test_drafter_commands(policy: str, tmp_path: Path) -> None:
    code, out, _ = run("drafter", "list", "-c", policy)
    assert code == ExitCode.OK and "no versions" in out
    assert run("drafter", "rollback", "-c", policy)[0] == ExitCode.INCOMPATIBLE
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    registry = DrafterRegistry(tmp_path / "state")
    registry.import_base(base)
    second = registry.save("head", BASE_VERSION, lambda folder: (folder / "w").write_bytes(b"w") and None)
    registry.promote(second)
    code, out, _ = run("drafter", "list", "-c", policy, "--json")
    assert [(each["version"], each["serving"]) for each in json.loads(out)] == [(BASE_VERSION, False), (second, True)]
    code, out, _ = run("drafter", "show", second, "-c", policy)
    assert json.loads(out)["parent"] == BASE_VERSION
    code, out, _ = run("drafter", "rollback", "-c", policy)
    assert code == ExitCode.OK and out.startswith(f"{BASE_VERSION} serves instead of {second}")
    (tmp_path / "state" / "drafters" / second / "w").write_bytes(b"x")
    code, _, err = run("drafter", "show", second, "-c", policy)
    assert code == ExitCode.INCOMPATIBLE and "SHA-256" in err


def test_files_that_cannot_be_read_are_one_line(policy: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = run("drafter", "list", "-c", policy, "--set", f"state_dir={tmp_path}/file")
    assert (code, err) == (ExitCode.DEPENDENCY, f"{tmp_path}/file/drafters/SERVING: Not a directory\n")
    folders = ("--out", f"{tmp_path}/out", "--work", f"{tmp_path}/work", "--prompts", f"{tmp_path}/none")
    code, _, err = run("train", "--target", f"{tmp_path}/none", *folders)
    assert code == ExitCode.INCOMPATIBLE and len(err.splitlines()) == 1 and "none" in err
    code, _, err = run("train", "--target", "models/demo-target", *folders)
    assert (code, err.splitlines()[-1]) == (ExitCode.DEPENDENCY, f"{tmp_path}/none: No such file or directory")


def test_the_environment_keeps_what_the_operator_set() -> None:
    environ = {"RAY_AUTH_MODE": "disabled"}
    prepare_environment(environ)
    assert environ["RAY_AUTH_MODE"] == "disabled" and environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_reading_commands_import_nothing_heavy(policy: str) -> None:
    code = (
        "import sys; from specblock.daemon import app, check;"
        "print([m for m in ('torch', 'ray', 'transformers', 'fastapi') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"


def test_json_logs(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        configure_logging(LoggingConfig.model_validate({"json": True, "level": "warning"}))
        logging.getLogger("x").info("quiet")
        try:
            raise ValueError("why")
        except ValueError:
            logging.getLogger("x").exception("it %s", "failed")
        assert isinstance(root.handlers[0].formatter, JsonFormatter)
    finally:
        root.handlers[:], root.level = handlers, level
    (line,) = capsys.readouterr().err.splitlines()
    record = json.loads(line)
    assert (record["level"], record["logger"], record["message"]) == ("error", "x", "it failed")
    assert "ValueError: why" in record["exception"] and record["time"].endswith("Z")

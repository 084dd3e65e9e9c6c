"""The whole loop with the real thing: `specblockd serve` as a process, real Ray, real Redis, a tiny real target.

The tiny target answers greedily, so its text is easy to learn; the base drafter knows nothing. An update must be
decided, trained, gated and swapped while requests go on.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from specblock.cuda_ext.sampling import SamplingParams
from specblock.daemon.oneshot import complete
from specblock.drafter.checkpoint import save_drafter
from specblock.drafter.initialise import config_for_target
from specblock.drafter.model import SpecBlockModel
from specblock.verifier.model import TargetModel

pytestmark = [pytest.mark.integration, pytest.mark.timeout(280)]

ROOT = Path(__file__).parents[2]
# The first parity check looks at eight conversations and wants 200 cycles; one with less is repeated a minute later.
TOKENS = 28
PROMPTS = ["import os", "def main(", "class A:", "for i in", "return x", "if a ==", "# note", "x = [1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    shape = {
        "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
        "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**shape))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        model.lm_head.weight[0] = 0  # never end of text
        # Few distinct tokens: what is seen in training comes back in held-out conversations.
        model.lm_head.weight[200:] = 0
    model.save_pretrained(folder / "target")
    AutoTokenizer.from_pretrained(ROOT / "models" / "demo-target").save_pretrained(folder / "target")
    target = TargetModel.load(str(folder / "target"), dtype=torch.float32)
    config = config_for_target(target.config, target.fingerprint, target.feature_layers, target.vocab_size)
    save_drafter(SpecBlockModel(config, target.embedding.float()), folder / "drafter", torch.float32)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Daemon:
    """A daemon process and an HTTP client for it."""

    def __init__(self, models: Path, folder: Path, *changes: str) -> None:
        self.folder, self.port = folder, free_port()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "policy.yaml").write_text(
            f"""
state_dir: {folder}/state
target: {{model: {models}/target, dtype: float32, max_context_tokens: 96}}
drafter: {{path: {models}/drafter, tree: fixed}}
engine: {{slots: 4, max_output_tokens: 64}}
windows: {{heldout_fraction: 0.4, max_window_tokens: 96}}
adaptation:
  decide_every_s: 0.5
  decide_every_events: 8
  cooldown_s: 0
  interference: 0
  price_train: 0.05
  budget_device_s_per_hour: 3600
  min_heldout_conversations: 6
  horizon_s: 3600
  arms:
    - {{name: restore, restores: true}}
    - {{name: full, patterns: ["*"], steps: 60, learning_rate: 3e-3}}
  policy: {{reference_acceptance: 4.0, min_train_windows: 8}}
trainer: {{batch_windows: 4}}
ray: {{dashboard: false}}
http: {{port: {self.port}, drain_deadline_s: 5}}
"""
        )
        self.log = (folder / "log").open("a")
        command = [sys.executable, "-m", "specblock.daemon", "serve", "-c", str(folder / "policy.yaml")]
        for change in changes:
            command += ["--set", change]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)

    def until(self, condition: Callable[[], Any], what: str, deadline_s: float = 120.0) -> Any:
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            assert self.process.poll() is None, f"the daemon ended: {self.tail()}"
            try:
                if value := condition():
                    return value
            except httpx.TransportError:
                pass
            threading.Event().wait(0.1)  # the condition is polled; nothing in another process can be waited on
        raise AssertionError(f"{what} did not happen in {deadline_s} s: {self.tail()} {self.status()}")

    def ready(self) -> Daemon:
        self.until(lambda: self.http.get("/health").status_code == 200, "readiness")
        return self

    def ask(self, prompt: str, tokens: int = TOKENS) -> dict[str, Any]:
        answer = self.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": tokens, "temperature": 0})
        assert answer.status_code == 200, answer.text
        result: dict[str, Any] = answer.json()
        return result

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get("/specblock/status").json()
        return found

    def ledger(self) -> list[dict[str, Any]]:
        path = self.folder / "state" / "bandit" / "ledger.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def tail(self) -> str:
        return (self.folder / "log").read_text()[-2000:]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=60)
        self.http.close()
        self.log.close()
        return code

    def descendants(self) -> dict[int, str]:
        rows = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
        parents: dict[int, tuple[int, str]] = {}
        for row in rows.splitlines()[1:]:
            pid, ppid, args = row.split(None, 2)
            parents[int(pid)] = (int(ppid), args)
        found = {}
        for pid, (_, args) in parents.items():
            above: int | None = pid
            while above in parents and above != self.process.pid:
                above = parents[above][0]
            if above == self.process.pid and pid != self.process.pid:
                found[pid] = args
        return found


@pytest.fixture
def start(models: Path, tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    started: list[Daemon] = []

    def make(*changes: str, name: str = "d") -> Daemon:
        daemon = Daemon(models, tmp_path / name, *changes)
        started.append(daemon)
        return daemon.ready()

    yield make
    for daemon in started:
        if daemon.process.poll() is None:
            daemon.process.kill()
            daemon.process.wait()
        daemon.http.close()
        daemon.log.close()
    shutil.rmtree(tmp_path, ignore_errors=True)


def alive(pids: dict[int, str]) -> list[str]:
    """Those of ``pids`` that still run the same program."""
    found = []
    for pid, args in pids.items():
        try:
            now = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if now and now[:20] == args[:20]:
            found.append(args)
    return found


def test_update_is_decided_trained_gated_swapped_and_survives_a_restart(start: Callable[..., Daemon]) -> None:
    daemon = start()
    texts: dict[str, str] = {}
    killed = False

    def served_by_an_update() -> str | None:
        nonlocal killed
        for prompt, answer in zip(PROMPTS, clients.map(daemon.ask, PROMPTS), strict=True):
            text = answer["choices"][0]["text"]
            assert texts.setdefault(prompt, text) == text, "the text must not depend on the drafter"
        if not killed and daemon.status()["bandit"].get("learned", 0) > 8:
            [bandit] = [p for p, args in daemon.descendants().items() if "ray::Bandit" in args]
            os.kill(bandit, signal.SIGKILL)
            killed = True
        version: str = daemon.ask(PROMPTS[0])["drafter_version"]
        return version if version != "v000000-base" else None

    with ThreadPoolExecutor(4) as clients:
        version = daemon.until(served_by_an_update, "a promoted update", 200.0)
    assert killed
    before = daemon.ask(PROMPTS[1], 48)["metrics"]["speculative_decoding"]["mean_acceptance_length"]
    assert before > 1.5, "the promoted drafter must accept more than the untrained one"
    stages = [r["stage"] for r in daemon.ledger()]
    assert any("promot" in s for s in stages), stages

    # Nothing lost, nothing learned twice: every event sent is learned exactly once, across the kill.
    def all_learned() -> bool:
        status = daemon.status()
        return bool(status["bandit"]["learned"] == status["engine"]["events_sent"])

    daemon.until(all_learned, "every event learned once", 30.0)
    learned = daemon.status()["bandit"]["learned"]
    children = daemon.descendants()
    assert daemon.stop() == 0, daemon.tail()
    assert alive(children) == []

    again = start()
    assert again.ask(PROMPTS[0])["drafter_version"] == version
    again.until(lambda: again.status()["bandit"].get("learned", 0) >= learned, "the bandit's state", 30.0)
    assert again.stop() == 0


def test_absurd_costs_lead_to_skip_and_the_ledger_says_why(start: Callable[..., Daemon]) -> None:
    daemon = start("adaptation.price_train=100", "adaptation.horizon_s=1")

    def skipped() -> list[dict[str, Any]]:
        for prompt in PROMPTS:
            daemon.ask(prompt, 8)
        return [r for r in daemon.ledger() if "its net value may be as low as" in r["reason"]]

    daemon.until(skipped, "a refusal on cost", 60.0)
    assert daemon.status()["engine"]["drafter_version"] == "v000000-base"
    assert all("promot" not in r["stage"] and "train" not in r["stage"] for r in daemon.ledger())
    explained = subprocess.run(
        [sys.executable, "-m", "specblock.daemon", "explain", "-c", str(daemon.folder / "policy.yaml")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "no update" in explained.lower() and "net value" in explained

    # Redis is killed: serving goes on, Redis comes back, learning goes on.
    [server] = [pid for pid, args in daemon.descendants().items() if "redis-server" in args]
    before = daemon.status()["bandit"]["learned"]
    os.kill(server, signal.SIGKILL)

    def learning_again() -> bool:
        daemon.ask(PROMPTS[0], 8)
        others = [pid for pid, args in daemon.descendants().items() if "redis-server" in args and pid != server]
        return bool(others) and bool(daemon.status()["bandit"]["learned"] > before + 2)

    daemon.until(learning_again, "learning after the death of redis-server", 60.0)
    assert "redis-server was gone" in daemon.tail()
    assert daemon.stop() == 0, daemon.tail()


def test_a_killed_engine_continues_its_request_and_one_that_cannot_load_ends_the_daemon(
    start: Callable[..., Daemon],
) -> None:
    # Tokens leave the engine at most once a second: the first group at once, if none left during the last second,
    # and the kill falls before the next one.
    daemon = start("adaptation.enabled=false", "engine.stream_interval_s=1")
    question = {"prompt": "import os", "max_tokens": 64, "temperature": 1, "seed": 5, "presence_penalty": 0.5}
    undisturbed = daemon.http.post("/v1/completions", json=question).json()["choices"][0]["text"]

    def engine_process() -> int:
        [engine] = [pid for pid, args in daemon.descendants().items() if "ray::Engine" in args]
        return engine

    silent_until = time.monotonic() + 1.0
    text, killed, engine = "", False, engine_process()
    daemon.until(lambda: time.monotonic() > silent_until, "the end of the stream interval", 5.0)
    with daemon.http.stream("POST", "/v1/completions", json={**question, "stream": True}, timeout=120) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, f"{event} {daemon.tail()}"
                text += event["choices"][0]["text"]
                if text and not killed:
                    os.kill(engine, signal.SIGKILL)
                    killed = True
    assert killed and text == undisturbed
    daemon.until(lambda: "the engine is back after" in daemon.tail(), "the engine's return", 60.0)
    daemon.ready()

    # The next engine finds no intact drafter: the daemon says why, once, and leaves nothing behind.
    [weights] = (daemon.folder / "state" / "drafters").glob("v000000-base/model.safetensors")
    weights.write_bytes(b"")
    children = daemon.descendants()
    os.kill(engine_process(), signal.SIGKILL)
    assert daemon.process.wait(timeout=60) == 3, daemon.tail()
    assert [line for line in daemon.tail().splitlines() if "model.safetensors" in line], daemon.tail()
    assert alive(children) == []


def test_prompt_lookup_serves_without_weights_trainer_or_adaptation(start: Callable[..., Daemon], models: Path) -> None:
    daemon = start("drafter={kind: prompt_lookup, tree: fixed}")
    prompt = "import os, import os, import os, import"
    question = {"prompt": prompt, "max_tokens": 48, "temperature": 1, "top_p": 0.9, "seed": 11, "ignore_eos": True}
    answer = daemon.http.post("/v1/completions", json=question).json()
    sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=11)
    target = TargetModel.load(str(models / "target"), dtype=torch.float32)
    assert answer["choices"][0]["text"] == complete(target, None, prompt, sampling, 48, ignore_eos=True).text
    greedy = daemon.ask(prompt, 48)
    assert greedy["choices"][0]["text"] == complete(target, None, prompt, SamplingParams(temperature=0), 48).text
    assert {answer["drafter_version"], greedy["drafter_version"]} == {"prompt_lookup"}
    assert greedy["metrics"]["speculative_decoding"]["mean_acceptance_length"] > 1.2

    # Acceptance is measured; nothing is kept to train on, and there is nobody to train.
    def learned() -> bool:
        status = daemon.status()
        return bool(0 < status["engine"]["events_sent"] == status["bandit"].get("learned"))

    daemon.until(learned, "every event learned", 30.0)
    status = daemon.status()
    assert status["adaptation"] == {"enabled": False, "reason": "the drafter has no weights; nothing to adapt"}
    assert (status["bandit"]["stage"], status["engine"]["windows"]) == ("paused", 0)
    assert not [args for args in daemon.descendants().values() if "ray::Trainer" in args]
    assert not (daemon.folder / "state" / "drafters").exists()
    assert 'version="prompt_lookup"' in daemon.http.get("/metrics").text
    log = (daemon.folder / "log").read_text()
    assert log.count("adaptation is off: the drafter has no weights; nothing to adapt") == 1
    children = daemon.descendants()
    assert daemon.stop() == 0, daemon.tail()
    assert alive(children) == []

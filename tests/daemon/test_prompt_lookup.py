"""Prompt lookup as the daemon's drafter: the engine actor, the bandit beside it, and the one-shot command."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from specblock.bandit.config import StreamConfig
from specblock.bandit.memory_stream import MemoryLog, MemoryStream
from specblock.cuda_ext.sampling import SamplingParams
from specblock.daemon import bandit_actor
from specblock.daemon.actors import EngineActor
from specblock.daemon.app import app
from specblock.daemon.bandit_actor import BanditActor
from specblock.daemon.config import DaemonConfig
from specblock.daemon.config_loader import parse_config
from specblock.daemon.messages import GenerationRequest, TokenChunk
from specblock.daemon.models import serving_drafter
from specblock.daemon.oneshot import complete
from specblock.drafter.lookup import LookupDrafter
from specblock.verifier.model import TargetModel

DEADLINE_S = 60.0
PROMPT = "for i in range: for i in range: for i in"
LOOKUP = "{kind: prompt_lookup, node_budget: 12}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target that soon repeats itself."""
    folder = tmp_path_factory.mktemp("target")
    torch.manual_seed(0)
    shape = {
        "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
        "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    network = LlamaForCausalLM(LlamaConfig(**shape))
    with torch.no_grad():
        network.lm_head.weight.mul_(20)
        network.lm_head.weight[0] = 0
        network.lm_head.weight[100:] = 0
    network.save_pretrained(folder)
    AutoTokenizer.from_pretrained(Path("models/demo-target")).save_pretrained(folder)
    return folder


def policy(model: Path, state: Path, drafter: str = LOOKUP, rest: str = "") -> DaemonConfig:
    return parse_config(policy_text(model, state, drafter) + rest, "f.yaml")


def policy_text(model: Path, state: Path, drafter: str = LOOKUP) -> str:
    return (
        f"state_dir: {state}\ntarget: {{model: {model}, dtype: float32, max_context_tokens: 128}}\n"
        f"drafter: {drafter}\nengine: {{slots: 2, max_output_tokens: 64}}\nwindows: {{max_window_tokens: 64}}\n"
    )


@pytest.fixture
def engine(model: Path, tmp_path: Path) -> Iterator[EngineActor]:
    """The actor's plain class, with sizes chosen by cost as in the daemon's default."""
    actor = EngineActor(policy(model, tmp_path), "engine-0", None)
    yield actor
    actor.close(1.0)
    gc.unfreeze()


def answers(engine: EngineActor, requests: list[GenerationRequest]) -> dict[str, list[TokenChunk]]:
    found: dict[str, list[TokenChunk]] = {r.request_id: [] for r in requests}
    for request in requests:
        engine.submit(request)
    end = time.monotonic() + DEADLINE_S
    while any(not chunks or chunks[-1].finish_reason is None for chunks in found.values()):
        assert time.monotonic() < end, found
        for chunk in engine.next_chunks(0.5):
            found[chunk.request_id].append(chunk)
    return found


def test_the_engine_serves_it_losslessly_without_a_registry_or_windows(
    engine: EngineActor, model: Path, tmp_path: Path
) -> None:
    target = TargetModel.load(str(model), dtype=torch.float32)
    samplings = {
        "greedy": SamplingParams(temperature=0),
        **{f"seed{n}": SamplingParams(temperature=1.0, top_p=0.9, seed=n) for n in range(3)},
    }
    tokens = tuple(target.tokenizer.encode(PROMPT))
    requests = [
        GenerationRequest(request_id=name, prompt_tokens=tokens, sampling=sampling, max_tokens=48)
        for name, sampling in samplings.items()
    ]
    for name, chunks in answers(engine, requests).items():
        plain = complete(target, None, PROMPT, samplings[name], 48)
        assert tuple(token for chunk in chunks for token in chunk.tokens) == plain.tokens, name
        assert "".join(chunk.text for chunk in chunks) == plain.text
        assert chunks[-1].stats is not None and chunks[-1].stats.drafter_version == "prompt_lookup"
    status = engine.status()
    assert (status.drafter_version, status.phase, status.speculation) == ("prompt_lookup", "ready", True)
    assert status.draft_tokens > 0 and status.accepted_tokens > 0, "the test must exercise accepted drafts"
    assert (status.windows, status.windows_dropped) == (0, 0)
    assert repr(engine) == "Engine(engine-0, drafter prompt_lookup)"
    assert not (tmp_path / "drafters").exists()
    assert gc.get_freeze_count() > 10_000, "collections do not look through what start-up made"
    with pytest.raises(ValueError, match="no drafter weights to swap"):
        engine.swap("v1", {})


def test_one_shot_completion_with_the_policys_drafter(model: Path, tmp_path: Path) -> None:
    config = policy(model, tmp_path)
    target = TargetModel.load(str(model), dtype=torch.float32)
    drafter = serving_drafter(config, target, config.drafter.path)
    assert isinstance(drafter, LookupDrafter)
    assert (drafter.settings.blocks, drafter.settings.node_budget) == (1, 12), "no later blocks, whatever the default"
    sampling = SamplingParams(temperature=0)
    plain, drafted = (complete(target, each, PROMPT, sampling, 48) for each in (None, drafter))
    assert drafted.text == plain.text and drafted.acceptance_length > 1.2


def test_generate_command(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(policy_text(model, tmp_path / "state"))

    def generate(*options: str) -> dict[str, object]:
        arguments = ["generate", PROMPT, "-c", str(path), "--seed", "3", "--max-tokens", "32", "--json", *options]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        found: dict[str, object] = json.loads(result.stdout)
        return found

    drafted, plain = generate(), generate("--no-speculation")
    assert drafted["tokens"] == plain["tokens"] and plain["acceptance_length"] == 1


class _NoActor:
    """Whatever is asked of it is a mistake."""


def test_the_bandit_rests_without_weights_and_wakes_with_the_next_policy(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    log = MemoryLog(time.monotonic)
    monkeypatch.setattr(bandit_actor.ray, "get_actor", lambda name: asked.append(name) or _NoActor())
    monkeypatch.setattr(bandit_actor, "RedisStream", lambda config, wait: MemoryStream(log))

    def runs_as(config: DaemonConfig, stage: str) -> None:
        actor = BanditActor(config, str(tmp_path / "bandit"), StreamConfig(url="redis://unused"))
        end, pause = time.monotonic() + DEADLINE_S, threading.Event()
        while actor.status()["stage"] != stage:
            assert time.monotonic() < end, actor.status()
            pause.wait(0.02)
        actor.close(DEADLINE_S)  # writes a snapshot, which remembers a pause

    runs_as(policy(model, tmp_path), "paused")
    assert asked == ["engine-0"], "there is no trainer to ask for"
    assert any((tmp_path / "bandit" / "snapshots").iterdir())
    runs_as(policy(model, tmp_path, "{path: somewhere}"), "idle")
    assert asked[1:] == ["engine-0", "trainer"]

"""``specblockd check``: each thing that can be wrong before the start is found, named and given its exit code."""

from __future__ import annotations

import json
import shutil
import socket
import struct
from pathlib import Path
from typing import Any

import pytest

from specblock.daemon import check_memory, models
from specblock.daemon.check import CheckReport, Finding, run_checks
from specblock.daemon.check_memory import free_bytes, kv_bytes, needs_bytes
from specblock.daemon.config import DaemonConfig, TargetConfig
from specblock.daemon.config_loader import parse_config
from specblock.daemon.errors import DeviceError, ExitCode
from specblock.daemon.safetensors_header import TensorInfo, read_header
from specblock.verifier.graphs import ROW_BUCKETS

TARGET = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "max_position_embeddings": 128,
}
DRAFTER = {
    "architectures": ["LlamaForCausalLMSpecBlock"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "draft_vocab_size": 16,
    "feature_layers": [0, 1],
}


def write_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * TensorInfo(shape, "BF16").num_elements
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, config, shapes in (
        ("target", TARGET, {"model.embed_tokens.weight": (32, 8), "model.norm.weight": (8,)}),
        ("drafter", DRAFTER, {"lm_head.weight": (16, 8)}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        write_tensors(tmp_path / name / "model.safetensors", shapes)
    (tmp_path / "target" / "tokenizer.json").write_text("{}")
    return tmp_path


def config(folder: Path, *overrides: str) -> DaemonConfig:
    text = f"""
state_dir: {folder}/state
target: {{model: {folder}/target, max_context_tokens: 128}}
drafter: {{path: {folder}/drafter}}
engine: {{max_output_tokens: 64}}
windows: {{max_window_tokens: 64, budget_bytes: 1MiB}}
ray: {{object_store_memory_bytes: 80MiB, dashboard: false}}
http: {{port: {free_port()}}}
"""
    return parse_config(text, "f.yaml", overrides)


def finding(report: CheckReport, name: str) -> Finding:
    (found,) = [each for each in report.findings if each.name == name]
    return found


def test_everything_is_fine(folder: Path) -> None:
    report = run_checks(config(folder))
    assert [each.level for each in report.findings] == ["ok"] * 7, report
    assert report.exit_code == ExitCode.OK and report.to_json()["ok"] is True
    assert not (folder / "state").exists(), "a check changes nothing"


LOOKUP = ("drafter.kind=prompt_lookup", "drafter.path=null")


def test_prompt_lookup_needs_no_drafter_on_disk(folder: Path) -> None:
    shutil.rmtree(folder / "drafter")
    report = run_checks(config(folder, *LOOKUP))
    assert [each.level for each in report.findings] == ["ok"] * 7, report
    assert finding(report, "drafter").message == "prompt_lookup: no weights to load or to train"
    assert finding(run_checks(config(folder, *LOOKUP, "target.model=org/name")), "memory").level == "warning"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("break_it", "name", "message"),
    [
        (lambda f: shutil.rmtree(f / "target"), "target", "no such directory"),
        (lambda f: (f / "target/config.json").unlink(), "target", "config.json: missing"),
        (lambda f: (f / "target/config.json").write_text("{"), "target", "config.json: cannot be read"),
        (lambda f: (f / "target/config.json").write_text("[]"), "target", "not a JSON object"),
        (lambda f: (f / "target/model.safetensors").unlink(), "target", "model.safetensors: missing"),
        (lambda f: (f / "target/model.safetensors").write_bytes(b"abc"), "target", "not a safetensors file"),
        (lambda f: (f / "target/tokenizer.json").unlink(), "target", "no tokenizer"),
        (lambda f: change(f / "target/config.json", layer_types=["sliding_attention"]), "target", "sliding_attention"),
        (lambda f: change(f / "target/config.json", max_position_embeddings=64), "target", "was made for 64"),
        (lambda f: shutil.rmtree(f / "drafter"), "drafter", "specblockd train"),
        (lambda f: change(f / "drafter/config.json", architectures=["Other"]), "drafter", "not a drafter"),
        (lambda f: change(f / "drafter/config.json", draft_vocab_size=8), "drafter", "lm_head.weight is (16, 8)"),
        (lambda f: change(f / "drafter/config.json", vocab_size=64), "drafter", "vocab_size is 64, the target's is 32"),
        (lambda f: change(f / "drafter/config.json", feature_layers=[0, 9]), "drafter", "target layer 9"),
        (lambda f: write_tensors(f / "drafter/model.safetensors", {"x": (1,)}), "drafter", "no lm_head.weight"),
    ],
)
def test_models_that_do_not_fit(folder: Path, break_it: Any, name: str, message: str) -> None:
    break_it(folder)
    report = run_checks(config(folder))
    found = finding(report, name)
    assert found.level == "error" and message in found.message
    assert report.exit_code == found.exit_code == ExitCode.INCOMPATIBLE


def test_a_truncated_weight_file(folder: Path) -> None:
    path = folder / "target" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "its header says" in finding(run_checks(config(folder)), "target").message


@pytest.mark.parametrize(
    ("model", "directory"),
    [
        ("gpt2", None),
        ("organisation/name", None),
        ("models/none", "models/none"),
        ("./x", "x"),
        ("a/b/c", "a/b/c"),
        ("/x", "/x"),
        ("~/x", str(Path.home() / "x")),
        ("tests/daemon", "tests/daemon"),
    ],
)
def test_paths_are_told_from_hub_ids(model: str, directory: str | None) -> None:
    target = TargetConfig(model=model)
    assert target.directory == (None if directory is None else Path(directory))
    assert target.source == (model if directory is None else directory)


def test_sharded_weights(folder: Path) -> None:
    target = folder / "target"
    (target / "model.safetensors").rename(target / "model-00001-of-00002.safetensors")
    write_tensors(target / "model-00002-of-00002.safetensors", {"b": (2, 2)})
    weights = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    assert finding(run_checks(config(folder)), "target").level == "ok"
    (target / "model-00002-of-00002.safetensors").unlink()
    assert "00002-of-00002.safetensors: missing" in finding(run_checks(config(folder)), "target").message


def test_a_hub_id_is_not_checked(folder: Path) -> None:
    report = run_checks(config(folder, "target.model=org/name"))
    assert finding(report, "target").level == finding(report, "memory").level == "warning"
    assert report.exit_code == ExitCode.OK


def test_a_used_port(folder: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        report = run_checks(config(folder, f"http.port={listener.getsockname()[1]}"))
    assert "cannot be used" in finding(report, "port").message
    assert report.exit_code == ExitCode.DEPENDENCY


def test_an_unreachable_redis(folder: Path) -> None:
    report = run_checks(config(folder, "redis.url=redis://u:secret@127.0.0.1:1/0"))
    assert finding(report, "redis").exit_code == ExitCode.DEPENDENCY
    assert "secret" not in str(report)


def test_a_state_dir_that_cannot_be(folder: Path) -> None:
    (folder / "file").write_text("")
    report = run_checks(config(folder, f"state_dir={folder}/file/state"))
    assert "not a directory" in finding(report, "state_dir").message
    assert report.exit_code == ExitCode.CONFIG


def test_too_little_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run_checks(config(folder, "windows.budget_bytes=9999TiB"))
    assert "GiB are needed" in finding(report, "memory").message
    assert report.exit_code == ExitCode.DEVICE
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DeviceError, match="no NVIDIA driver"):
        free_bytes("cuda:0")


def test_a_gpu_that_reports_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$*" in *--id=1*) echo 1000;; *) echo "No devices were found"; exit 6;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert free_bytes("cuda:1") == 1000 * 2**20
    with pytest.raises(DeviceError, match="No devices"):
        free_bytes("cuda:0")


def test_memory_is_counted_where_it_is_used(folder: Path) -> None:
    tensors = {"w": TensorInfo((10,), "BF16")}
    base = config(folder, "drafter.node_budget=31", "engine.slots=2", "target.dtype=bfloat16")
    # 2 (keys, values) x 2 layers x 2 slots x 1 head x 4 per head x (128 + 32) rows x 4 bytes
    assert kv_bytes(base, TARGET) == 2 * 2 * 2 * 1 * 4 * 160 * 4
    engine = 10 * 4 + kv_bytes(base, TARGET) + 10 * 4 * 2
    host = base.windows.budget_bytes + base.ray.object_store_memory_bytes + base.redis.maxmemory_bytes
    assert needs_bytes(base, TARGET, tensors, tensors) == {"cpu": host + engine + 10 * (16 + 8)}, "full blends"
    assert kv_bytes(base.with_dtype("float32"), TARGET) == kv_bytes(base, TARGET), "what is multiplied is rounded"
    assert kv_bytes(base.with_dtype("float64"), TARGET) == 2 * kv_bytes(base, TARGET)
    on_gpu = ("target.device=cuda", "ray.engine_gpus=1", "adaptation.enabled=false", "target.dtype=bfloat16")
    gpu = config(folder, "engine.slots=2", *on_gpu)
    rows = check_memory.MOST_ROWS
    assert rows == ROW_BUCKETS[-1]
    assert kv_bytes(gpu, TARGET) == kv_bytes(base, TARGET) // 2 + 2 * 2 * 2 * 1 * 4 * rows * 2, "batches are filled up"
    results = 2 * 2 * rows * (int(TARGET["vocab_size"]) + 3 * int(TARGET["hidden_size"])) * 2
    engine = 10 * 2 + kv_bytes(gpu, TARGET) + 10 * 2 * 2
    assert needs_bytes(gpu, TARGET, tensors, tensors) == {"cpu": host, "cuda:0": engine + results}
    without = config(folder, "engine.slots=2", "engine.cuda_graphs=false", *on_gpu)
    assert needs_bytes(without, TARGET, tensors, tensors) == {"cpu": host, "cuda:0": engine}
    lookup = config(folder, "engine.slots=2", "target.dtype=bfloat16", *LOOKUP)
    weightless = 10 * 4 + kv_bytes(lookup, TARGET) + lookup.ray.object_store_memory_bytes + lookup.redis.maxmemory_bytes
    assert needs_bytes(lookup, TARGET, tensors, {}) == {"cpu": weightless}, "no windows, no trainer"
    assert free_bytes("cpu") > 0 and check_memory.DTYPE_BYTES["bfloat16"] == 2


@pytest.mark.parametrize(("fast", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_memory_names_what_auto_means_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, dtype: str
) -> None:
    monkeypatch.setattr(models, "serves_faster_in_bfloat16", lambda device: fast)
    assert finding(run_checks(config(folder)), "memory").message.endswith(f"models in {dtype}")
    assert finding(run_checks(config(folder, "target.dtype=float64")), "memory").message.endswith("models in float64")


@pytest.mark.parametrize("text", [b"", b"\xff" * 16, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 9) + b'{"a": {}}'])
def test_files_that_are_no_safetensors(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x").write_bytes(text)
    with pytest.raises(ValueError, match="safetensors"):
        read_header(tmp_path / "x")

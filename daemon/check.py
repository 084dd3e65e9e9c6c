"""``specblockd check``: everything that can be found wrong before a weight is loaded, in about a second."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from specblock.daemon.check_memory import free_bytes, needs_bytes
from specblock.daemon.config import DaemonConfig
from specblock.daemon.config_types import redact_url
from specblock.daemon.errors import (
    ConfigError,
    DependencyError,
    DeviceError,
    ExitCode,
    FailedCheckError,
    IncompatibleError,
    SpecblockError,
)
from specblock.daemon.redis_probe import probe
from specblock.daemon.redis_server import find_server_binary
from specblock.daemon.safetensors_header import TensorInfo, read_header
from specblock.drafter.config import DrafterConfig

GIB = 2**30
_ATTENTION = "full_attention"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; ``exit_code`` is not OK exactly when ``level`` is "error"."""

    name: str
    level: Literal["ok", "warning", "error"]
    message: str
    exit_code: ExitCode = ExitCode.OK


@dataclass(frozen=True, slots=True)
class CheckReport:
    """All findings, in the order in which the daemon would need the parts."""

    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> ExitCode:
        """That of the first error, else OK."""
        return next((finding.exit_code for finding in self.findings if finding.level == "error"), ExitCode.OK)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "ok": self.exit_code == ExitCode.OK,
            "exit_code": int(self.exit_code),
            "findings": [{**asdict(finding), "exit_code": int(finding.exit_code)} for finding in self.findings],
        }


@dataclass(frozen=True, slots=True)
class StoredTarget:
    """A target directory as far as it can be read without loading it."""

    config: dict[str, Any]
    tensors: dict[str, TensorInfo]


def run_checks(config: DaemonConfig) -> CheckReport:
    """Runs every check; a failed one does not stop the others."""
    findings: list[Finding] = []

    def attempt(name: str, check: Callable[[], str]) -> None:
        try:
            message = check()
        except SpecblockError as error:
            findings.append(Finding(name, "error", str(error), error.exit_code))
        else:
            level: Literal["ok", "warning"] = "warning" if message.startswith("not checked") else "ok"
            findings.append(Finding(name, level, message))

    target = config.target.directory
    attempt("state_dir", lambda: _check_state_dir(config.state_dir))
    attempt("target", lambda: _check_target(config, target))
    attempt("drafter", lambda: _check_drafter(config, target))
    attempt("memory", lambda: _check_memory(config, target))
    attempt("redis", lambda: _check_redis(config))
    attempt("ray", lambda: _check_ray(config))
    attempt("port", lambda: _check_port(config))
    return CheckReport(tuple(findings))


def refuse_if_broken(config: DaemonConfig) -> None:
    """What ``serve`` does before it starts anything.

    Raises:
        FailedCheckError: one line per error; warnings pass.
    """
    report = run_checks(config)
    errors = [finding.message for finding in report.findings if finding.level == "error"]
    if errors:
        raise FailedCheckError(errors, report.exit_code)


def _check_state_dir(state_dir: Path) -> str:
    existing = next(path for path in (state_dir.absolute(), *state_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"state_dir: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"state_dir: {existing} is not writable")
    return str(state_dir) if existing == state_dir.absolute() else f"{state_dir} (will be created)"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IncompatibleError(f"{path}: missing") from None
    except (OSError, ValueError) as error:
        raise IncompatibleError(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise IncompatibleError(f"{path}: not a JSON object")
    return data


def read_target(folder: Path) -> StoredTarget:
    """The target's configuration and the shapes of its weights.

    Raises:
        IncompatibleError: a file is missing or damaged; the message names it.
    """
    config = _read_json(folder / "config.json")
    index = folder / "model.safetensors.index.json"
    shards = sorted(set(_read_json(index).get("weight_map", {}).values())) if index.exists() else ["model.safetensors"]
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        tensors |= _read_weights(folder / shard)
    return StoredTarget(config, tensors)


def _read_weights(path: Path) -> dict[str, TensorInfo]:
    try:
        return read_header(path)
    except FileNotFoundError:
        raise IncompatibleError(f"{path}: missing") from None
    except (OSError, ValueError) as error:
        raise IncompatibleError(str(error)) from None


def _check_target(config: DaemonConfig, folder: Path | None) -> str:
    if folder is None:
        return f"not checked: {config.target.model} is no directory here and will be looked up on the hub"
    if not folder.is_dir():
        raise IncompatibleError(f"target.model: {folder}: no such directory")
    stored = read_target(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise IncompatibleError(f"{folder}: no tokenizer (tokenizer.json) in this directory")
    others = set(stored.config.get("layer_types") or ()) - {_ATTENTION}
    if others:
        raise IncompatibleError(f"{folder}: has layers of type {', '.join(sorted(others))}; only full attention works")
    longest = stored.config.get("max_position_embeddings")
    if isinstance(longest, int) and config.target.max_context_tokens > longest:
        raise IncompatibleError(
            f"target.max_context_tokens: {config.target.max_context_tokens}, but {folder} was made for {longest}"
        )
    elements = sum(tensor.num_elements for tensor in stored.tensors.values())
    kind, layers = stored.config.get("model_type"), stored.config.get("num_hidden_layers")
    return f"{folder}: {kind}, {layers} layers, {elements / 1e6:.1f} M parameters"


def _check_drafter(config: DaemonConfig, target_folder: Path | None) -> str:
    folder = config.drafter.path
    if folder is None:
        return f"{config.drafter.kind}: no weights to load or to train"
    if not folder.is_dir():
        raise IncompatibleError(f"drafter.path: {folder}: no such directory; `specblockd train` makes one")
    try:
        drafter = DrafterConfig.from_json(_read_json(folder / "config.json"))
    except ValueError as error:
        raise IncompatibleError(f"{folder / 'config.json'}: {error}") from None
    if drafter.kind != config.drafter.kind:
        raise IncompatibleError(f"drafter.kind: {config.drafter.kind}, but {folder} holds a drafter of {drafter.kind}")
    tensors = _read_weights(folder / "model.safetensors")
    for problem in _drafter_problems(drafter, tensors):
        raise IncompatibleError(f"{folder}: {problem}")
    if target_folder is None or not target_folder.is_dir():
        return f"not checked: {folder} is a drafter, but the target's shapes are not known yet"
    for problem in _mismatches(drafter, read_target(target_folder).config):
        raise IncompatibleError(f"{folder} does not fit {target_folder}: {problem}")
    elements = sum(tensor.num_elements for tensor in tensors.values())
    return f"{folder}: {drafter.num_slots} tokens per block, {elements / 1e6:.1f} M parameters, fits the target"


def _drafter_problems(drafter: DrafterConfig, tensors: dict[str, TensorInfo]) -> Iterator[str]:
    head = tensors.get("lm_head.weight")
    if head is None:
        yield "model.safetensors has no lm_head.weight"
    elif head.shape != (drafter.draft_vocab_size, drafter.hidden_size):
        yield f"lm_head.weight is {head.shape}, expected {(drafter.draft_vocab_size, drafter.hidden_size)}"


def _mismatches(drafter: DrafterConfig, target: dict[str, Any]) -> Iterator[str]:
    for name in ("hidden_size", "vocab_size"):
        if target.get(name) != getattr(drafter, name):
            yield f"{name} is {getattr(drafter, name)}, the target's is {target.get(name)}"
    layers = target.get("num_hidden_layers", 0)
    if drafter.feature_layers and drafter.feature_layers[-1] >= layers:
        yield f"it reads target layer {drafter.feature_layers[-1]}, the target has {layers}"


def _check_memory(config: DaemonConfig, target_folder: Path | None) -> str:
    weights = None if config.drafter.path is None else config.drafter.path / "model.safetensors"
    if target_folder is None or not target_folder.is_dir() or not (weights is None or weights.is_file()):
        return "not checked: target and drafter must be there to estimate it"
    if config.target.dtype == "auto":
        from specblock.daemon.models import settle_dtype  # torch; not needed where the file names the format

        config = settle_dtype(config)
    target = read_target(target_folder)
    drafter = {} if weights is None else _read_weights(weights)
    lines = []
    for device, need in needs_bytes(config, target.config, target.tensors, drafter).items():
        free = free_bytes(device)
        if need > free:
            raise DeviceError(f"{device}: about {need / GIB:.2f} GiB are needed, {free / GIB:.2f} GiB are free")
        lines.append(f"{device}: about {need / GIB:.2f} GiB of {free / GIB:.2f} GiB free")
    return f"{', '.join(lines)}, models in {config.target.dtype}"


def _check_redis(config: DaemonConfig) -> str:
    if config.redis.url is None:
        return f"private child, {find_server_binary()}"
    info = probe(config.redis.url, min(config.redis.socket_timeout_s, 3.0))
    return f"{redact_url(config.redis.url)} answers, version {info.version}"


def _check_ray(config: DaemonConfig) -> str:
    if importlib.util.find_spec("ray") is None:
        raise DependencyError("ray is not installed: pip install 'ray[default]'")
    if config.ray.address == "local" and config.ray.dashboard:
        _require_free("ray.dashboard_port", config.ray.dashboard_host, config.ray.dashboard_port)
    return "private cluster" if config.ray.address == "local" else f"joins {config.ray.address} at start"


def _check_port(config: DaemonConfig) -> str:
    _require_free("http.port", config.http.host, config.http.port)
    return f"{config.http.host}:{config.http.port} is free"


def _require_free(what: str, host: str, port: int) -> None:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe_socket:
            # As servers do: a port in TIME_WAIT after a restart is free.
            probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe_socket.bind(address)
    except OSError as error:
        raise DependencyError(f"{what}: {host}:{port} cannot be used: {error.strerror}") from None

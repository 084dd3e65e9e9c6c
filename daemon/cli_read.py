"""What the reading commands show: the running daemon, the ledger and the stored drafter versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from specblock.bandit.errors import LedgerError
from specblock.bandit.explain import explain
from specblock.bandit.ledger import read_balance, read_newest
from specblock.daemon.config import NOTHING_TO_ADAPT, DaemonConfig
from specblock.daemon.errors import DependencyError, IncompatibleError, VerificationError
from specblock.daemon.registry import DrafterRegistry
from specblock.daemon.runfile import read_run_file

STATUS_TIMEOUT_S = 10.0


def fetch_status(config: DaemonConfig) -> dict[str, Any]:
    """``/specblock/status`` of the daemon that runs in the configured state directory.

    Raises:
        DependencyError: none runs, or it does not answer.
    """
    info = read_run_file(config.state_dir)
    headers = {} if config.http.api_key is None else {"authorization": f"Bearer {config.http.api_key}"}
    try:
        # trust_env=False: a proxy configured for the internet must not be asked about localhost.
        with httpx.Client(timeout=STATUS_TIMEOUT_S, trust_env=False) as client:
            answer = client.get(f"{info.url}/specblock/status", headers=headers)
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise DependencyError(f"the daemon at {info.url} does not answer: {error}") from None
    return {"pid": info.pid, "url": info.url, **found}


def status_lines(status: Mapping[str, Any]) -> Iterator[str]:
    """The status for people."""
    engine = status["engine"]
    cycles, accepted = engine["cycles"], engine["accepted_tokens"]
    length = f"{1 + accepted / cycles:.2f}" if cycles else "none yet"
    yield f"daemon      {status['url']} (pid {status['pid']}), version {status['version']}"
    yield f"model       {status['model']} in {status['dtype']}"
    yield f"phase       {engine['phase']} {engine['detail']}".rstrip()
    yield f"drafter     {engine['drafter_version']}, speculation {'on' if engine['speculation'] else 'off'}"
    if engine.get("tree_nodes_mean"):
        yield (
            f"trees       {engine['tree_nodes_mean']:.1f} nodes, {engine['tree_blocks_mean']:.1f} blocks, "
            f"{engine['plain_cycles_share']:.0%} of recent cycles without drafts"
        )
    yield f"requests    {engine['running']} running, {engine['waiting']} waiting, {engine['slots']} slots"
    yield f"acceptance  {length} tokens per cycle, bonus included, over {cycles} cycles"
    yield f"tokens      {engine['prompt_tokens']} read, {engine['generation_tokens']} produced"
    yield f"windows     {engine['windows']} in {engine['window_bytes']} bytes"
    if not status["adaptation"]["enabled"]:
        yield f"adaptation  off: {status['adaptation']['reason']}"
    for name, value in sorted(status["bandit"].items()):
        if isinstance(value, str | int | float):
            yield f"adaptation  {name}: {value}"


def _ledger(config: DaemonConfig) -> Path:
    path = Path(config.service_config().directory) / "ledger.jsonl"
    if not path.is_file():
        raise DependencyError(f"there is no ledger yet: {path} does not exist")
    return path


def explanations(config: DaemonConfig, count: int) -> list[str]:
    """The latest ``count`` records of the ledger in words, oldest first; why there are none where there cannot be any.

    Raises:
        DependencyError: there is no ledger.
        VerificationError: it is damaged.
    """
    if not config.drafter.has_weights:  # a ledger in this directory is that of an earlier policy
        return [NOTHING_TO_ADAPT]
    path = _ledger(config)
    try:
        return [explain(record) for record in read_newest(path, count)] or ["nothing has been decided yet"]
    except LedgerError as error:
        raise VerificationError(f"{path}: {error}") from None


def balance(config: DaemonConfig) -> dict[str, float]:
    """Costs and gains over the whole ledger, in serving device-seconds.

    Raises:
        DependencyError: there is no ledger.
        VerificationError: it is damaged.
    """
    path = _ledger(config)
    try:
        total = read_balance(path)
    except LedgerError as error:
        raise VerificationError(f"{path}: {error}") from None
    return {**asdict(total), "net_s": total.net_s}


def drafter_versions(config: DaemonConfig) -> list[dict[str, Any]]:
    """Every stored version, oldest first, without its file list."""
    registry = DrafterRegistry(config.state_dir)
    serving, previous = registry.serving(), registry.previous()
    return [
        {
            "version": manifest.version,
            "parent": manifest.parent,
            "arm": manifest.arm,
            "created_at_unix_s": manifest.created_at_unix_s,
            "size_bytes": manifest.size_bytes,
            "serving": manifest.version == serving,
            "previous": manifest.version == previous,
        }
        for manifest in registry.list()
    ]


def drafter_lines(versions: list[dict[str, Any]]) -> Iterator[str]:
    """The versions as a table."""
    if not versions:
        yield "no versions are stored; a base drafter with weights is imported at the first start"
    for entry in versions:
        mark = "*" if entry["serving"] else "-" if entry["previous"] else " "
        yield f"{mark} {entry['version']:<32}{entry['size_bytes'] / 2**20:>9.1f} MiB  from {entry['parent'] or 'file'}"


def drafter_manifest(config: DaemonConfig, version: str) -> dict[str, Any]:
    """A version's manifest, after its files were verified.

    Raises:
        IncompatibleError: no such version, or it is damaged.
    """
    registry = DrafterRegistry(config.state_dir)
    registry.path(version)
    return asdict(registry.show(version))


def rollback(config: DaemonConfig) -> Iterator[str]:
    """Makes the previous version the serving one.

    Raises:
        IncompatibleError: there is none, or it is damaged.
    """
    registry = DrafterRegistry(config.state_dir)
    before = registry.serving()
    if before is None:
        raise IncompatibleError(f"no drafter versions are stored in {config.state_dir}")
    yield f"{registry.rollback()} serves instead of {before}"
    try:
        info = read_run_file(config.state_dir)
    except DependencyError:
        return
    yield f"the running daemon (pid {info.pid}) keeps {before} until it is restarted"

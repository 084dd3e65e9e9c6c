"""``specblockd replay``: recorded decisions taken again, or decided by another policy's numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from specblock.bandit.config import PolicyConfig
from specblock.bandit.errors import LedgerError
from specblock.bandit.ledger import LedgerRecord, read_ledger
from specblock.bandit.replay import Reproduction, reproductions
from specblock.bandit.what_if import Difference, WhatIf, what_if
from specblock.daemon.config import DaemonConfig
from specblock.daemon.config_loader import load_config
from specblock.daemon.errors import DependencyError, ExitCode, VerificationError

NOT_REPRODUCED = 1
"""Exit code when a recorded decision does not come out the same."""

TYPICAL_TOKENS = 64
"""Tokens of a conversation that the daemon's bandit assumes before it has measured any (``bandit_actor``)."""

Show = Callable[[str], None]


def run(ledger: Path, config: Path, policy: Path | None, as_json: bool, show: Show) -> int:
    """Reproduces a ledger with ``config``, or decides it with ``policy``; returns the exit code.

    Raises:
        ConfigError: a policy file is wrong.
        DependencyError: there is no such ledger.
        VerificationError: the ledger is damaged.
    """
    if not ledger.is_file():
        raise DependencyError(f"{ledger}: no such ledger; a daemon writes STATE_DIR/bandit/ledger.jsonl")
    if policy is not None:
        found = what_if(lambda: read(ledger), rule(load_config(policy)))
        lines = [json.dumps(_plain(found, policy), indent=2)] if as_json else what_if_lines(found, policy)
        for line in lines:
            show(line)
        return ExitCode.OK
    taken = list(reproductions(read(ledger), rule(load_config(config))))
    failed = sum(not one.reproduced for one in taken)
    if as_json:
        plain = {"decisions": len(taken), "reproduced": len(taken) - failed, "each": [asdict(one) for one in taken]}
        show(json.dumps(plain, indent=2))
    else:
        for line in reproduction_lines(taken, config):
            show(line)
    return NOT_REPRODUCED if failed else ExitCode.OK


def rule(config: DaemonConfig) -> PolicyConfig:
    """The decision rule as the daemon's bandit builds it from the same file."""
    return config.adaptation.policy_config(positions_per_step=TYPICAL_TOKENS * config.trainer.batch_windows)


def read(ledger: Path) -> Iterator[LedgerRecord]:
    """The ledger's records.

    Raises:
        VerificationError: a line cannot be read.
    """
    try:
        yield from read_ledger(ledger)
    except LedgerError as error:
        raise VerificationError(f"{ledger}: {error}") from None


def reproduction_lines(taken: list[Reproduction], config: Path) -> Iterator[str]:
    """One line per run of decisions that came out the same, and one per decision that did not."""
    for same, group in groupby(taken, key=lambda one: one.reproduced):
        members = list(group)
        if same:
            first, last = members[0].decision_id, members[-1].decision_id
            name = first if first == last else f"{first} to {last}"
            yield f"{name}: {_count(len(members), 'decision')} reproduced bit for bit"
        else:
            yield from (f"{one.decision_id} ({one.stage}): NOT reproduced: {one.why}" for one in members)
    failed = sum(not one.reproduced for one in taken)
    yield f"{len(taken) - failed} of {_count(len(taken), 'decision')} reproduced with {config}"
    if any("fingerprint" in one.why for one in taken):
        yield f"a fingerprint differs when the decision was not taken with {config}: name its policy with --config"


def what_if_lines(found: WhatIf, policy: Path) -> Iterator[str]:
    """Differences and balance for people."""
    yield from (line for difference in found.differences for line in _difference(difference, policy))
    same = found.decisions - found.without_inputs - len(found.differences)
    yield f"{same} of {_count(found.decisions, 'decision')} would have been the same with {policy}"
    if found.without_inputs:
        yield f"{_count(found.without_inputs, 'decision')} could not be judged: their inputs are not in the ledger"
    recorded, modelled = found.recorded, found.modelled
    yield f"{'balance in device-seconds':<32}{'charged':>10}{'saved':>10}{'net':>10}"
    yield _row("recorded (measured)", recorded.charged_s, recorded.realised_s, recorded.net_s)
    yield _row(f"{policy.name} (modelled)", modelled.charged_s, modelled.saved_s, modelled.net_s)
    yield (
        f"modelled: {_count(modelled.kept, 'recorded update')} kept as measured, {modelled.dropped} left out, "
        f"{modelled.added} added at what the policy itself predicts (cost {modelled.predicted_charged_s:.1f}, "
        f"benefit {modelled.predicted_saved_s:.1f}); nobody measured those, and what came later would have looked "
        "different"
    )


def _row(name: str, *values_s: float) -> str:
    return f"  {name:<30}" + "".join(f"{value_s:>10.1f}" for value_s in values_s)


def _difference(found: Difference, policy: Path) -> Iterator[str]:
    yield f"{found.decision_id} ({found.stage}): recorded {found.recorded}, {policy.name} {found.other}"
    yield f"    recorded: {found.recorded_why}"
    yield f"    {policy.name}: {found.other_why}"


def _plain(found: WhatIf, policy: Path) -> dict[str, object]:
    recorded, modelled = found.recorded, found.modelled
    sums = {"charged_s": modelled.charged_s, "saved_s": modelled.saved_s, "net_s": modelled.net_s}
    return {
        "policy": str(policy),
        "decisions": found.decisions,
        "without_inputs": found.without_inputs,
        "differences": [asdict(difference) for difference in found.differences],
        "recorded_measured": {**asdict(recorded), "net_s": recorded.net_s},
        "modelled": {**asdict(modelled), **sums},
    }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

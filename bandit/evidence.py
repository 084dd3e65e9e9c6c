"""Measurements as the ledger writes them: numbers with names, and words."""

from __future__ import annotations

from specblock.bandit.gate import GateEvidence, Saving
from specblock.bandit.parity import ParityEvidence


def saving_numbers(saving: Saving) -> dict[str, float]:
    """Of a paired comparison."""
    per_domain = {f"saving.{domain.domain}": domain.saving for domain in saving.domains}
    errors = {f"saving_se.{domain.domain}": domain.se for domain in saving.domains}
    counts = {f"conversations.{domain.domain}": float(domain.conversations) for domain in saving.domains}
    total = {"saving": saving.relative, "saving_se": saving.se, "conversations": saving.conversations}
    return {**total, **per_domain, **errors, **counts}


def gate_numbers(evidence: GateEvidence) -> dict[str, float]:
    """Of one look at the gate."""
    bounds = {"clipped_mean": evidence.mean, "lower": evidence.lower, "upper": evidence.upper}
    return {**saving_numbers(evidence.saving), **bounds}


def parity_numbers(evidence: ParityEvidence) -> dict[str, float]:
    """Of a parity check."""
    return {
        "difference": evidence.difference,
        "lower": evidence.lower,
        "upper": evidence.upper,
        "live_acceptance": evidence.live_acceptance,
        "replay_acceptance": evidence.replay_acceptance,
        "conversations": float(evidence.conversations),
    }


def parity_words(evidence: ParityEvidence) -> str:
    """A parity check in words."""
    return (
        f"{evidence.verdict}: live acceptance differs from exact replay by {evidence.difference:+.2%} "
        f"({evidence.lower:+.2%} to {evidence.upper:+.2%}, {evidence.conversations} conversations)"
    )

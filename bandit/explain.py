"""A ledger record in plain words."""

from __future__ import annotations

from specblock.bandit.cost import NetEstimate
from specblock.bandit.decision import CHECK, FAULT, PROBE
from specblock.bandit.ledger import DECIDED, LedgerRecord


def explain(record: LedgerRecord) -> str:
    """One paragraph: what was decided or done, why, and what it cost or brought."""
    head = f"{record.decision_id}: "
    tail = f" Charged {record.charged_s:.2f} device-seconds." if record.charged_s else ""
    if record.stage == DECIDED:
        return head + _decided(record)
    return head + _stage(record) + tail


def _decided(record: LedgerRecord) -> str:
    if record.action == PROBE:
        return f"Trying {record.arm} on {record.base_version}: {_sentence(record.reason)}{_terms(record.estimate())}"
    if record.action == CHECK:
        return f"Checking live acceptance against exact replay: {_sentence(record.reason)}"
    if record.verdict == FAULT:
        return f"Fault, nothing is trained: {_sentence(record.reason)}"
    best = max(record.estimates, key=lambda e: e.net_lower_s, default=None)
    return f"No update: {_sentence(record.reason)}{_terms(best)}"


def _stage(record: LedgerRecord) -> str:
    name, candidate, base = record.stage.partition("-")[0], record.candidate_version, record.base_version
    openings = {
        "probing": f"Training a micro-profile of {record.arm}.",
        "probed": "Micro-profile measured:",
        "training": f"Training the rest of {record.arm}.",
        "trained": f"Trained {candidate}.",
        "gating": f"Comparing {candidate} with {base} on conversations newer than its training data.",
        "gated": "Looked at the gate:",
        "promoting": f"{candidate} passed the gate and is being promoted.",
        "promoted": f"{candidate} serves instead of {base}.",
        "verifying": f"Checking that {candidate} accepts live what its replay accepts.",
        "verified": f"Live acceptance of {candidate} was checked:",
        "settling": f"Measuring what {candidate} really saved.",
        "settled": f"{candidate} is settled:",
        "rejected": f"{candidate} was gated out and never served:",
        "rolling_back": f"Rolling back to {base}:",
        "rolled_back": f"Rolled back to {base}:",
        "abandoned": "Abandoned:",
        "checked": "Parity checked:",
        "closed": f"{candidate} no longer serves:",
    }
    return f"{openings.get(name, name)} {_sentence(record.reason)}".strip()


def _terms(estimate: NetEstimate | None) -> str:
    if estimate is None:
        return ""
    blocked = f" It may not run now: {estimate.blocked}." if estimate.blocked else ""
    return (
        f" Terms of {estimate.arm}: saving {estimate.gain_mean:.1%} of {estimate.busy_fraction:.0%} busy time on "
        f"{estimate.serving_devices:g} device(s) for {estimate.value_s:.0f} s is worth {estimate.benefit_s:.1f} "
        f"device-seconds; training {estimate.train_s:.1f}, trial {estimate.probe_s:.1f}, scoring "
        f"{estimate.score_s:.1f}, in all {estimate.cost_s:.1f}.{blocked}"
    )


def _sentence(text: str) -> str:
    text = text.strip()
    return text if not text or text.endswith(".") else text + "."

"""A ledger record in plain words."""

from __future__ import annotations

from specblock.bandit.decision import CHECK, FAULT, PROBE, Option
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
        opening = "Trying" if record.probability == 1 else f"By chance ({record.probability:.1%}) trying"
        option = record.option()
        what = option.named if option else record.arm
        return f"{opening} {what} on {record.base_version}: {_sentence(record.reason)}{_terms(option)}"
    if record.action == CHECK:
        return f"Checking live acceptance against exact replay: {_sentence(record.reason)}"
    if record.verdict == FAULT:
        return f"Fault, nothing is trained: {_sentence(record.reason)}"
    best = max(record.options, key=lambda option: option.value.net_lower, default=None)
    return f"No update: {_sentence(record.reason)}{_terms(best)}"


def _stage(record: LedgerRecord) -> str:
    name, candidate, base = record.stage.partition("-")[0], record.candidate_version, record.base_version
    openings = {
        "probing": f"Training a micro-profile of {record.arm}.",
        "scoring": f"Comparing {candidate} with {base} on held-out conversations.",
        "probed": "Trial measured:",
        "training": f"Training the rest of {record.arm}.",
        "trained": f"Trained {candidate}.",
        "gating": f"Comparing {candidate} with {base} on conversations that came after it was made or chosen.",
        "gated": "Looked at the gate:",
        "promoting": f"{candidate} passed the gate and is being promoted.",
        "promoted": f"{candidate} serves instead of {base}.",
        "verifying": f"Checking that {candidate} accepts live what its replay accepts.",
        "verified": f"Live acceptance of {candidate} was checked:",
        "settling": f"Measuring what {candidate} really saved.",
        "settled": f"{candidate} is settled:",
        "rejected": f"{candidate} was gated out and did not serve:",
        "rolling_back": f"Rolling back to {base}:",
        "rolled_back": f"Rolled back to {base}:",
        "abandoned": "Abandoned:",
        "checked": "Parity checked:",
        "closed": f"{candidate} no longer serves:",
    }
    return f"{openings.get(name, name)} {_sentence(record.reason)}".strip()


def _terms(option: Option | None) -> str:
    if option is None:
        return ""
    value, blocked = option.value, f" It may not run now: {option.blocked}." if option.blocked else ""
    return (
        f" Terms of {option.named}: saving {value.gain:.1%} of {value.busy_devices:.2f} busy devices for "
        f"{value.horizon_value_s:.0f} s is worth {value.benefit:.1f} device-seconds; training {value.train_s:.1f}, "
        f"trial {value.probe_s:.1f}, scoring {value.score_s:.1f}, in all {value.cost:.1f}.{blocked}"
    )


def _sentence(text: str) -> str:
    text = text.strip()
    return text if not text or text.endswith(".") else text + "."

"""What happened to acceptance: nothing, drift, a fault, or another load or sampling. Pure."""

from __future__ import annotations

from specblock.bandit.config import PolicyConfig
from specblock.bandit.decision import DRIFT, FAULT, LOAD, NONE, DecisionContext, PolicyState
from specblock.bandit.parity import ParityEvidence


def attribute(context: DecisionContext, state: PolicyState, config: PolicyConfig) -> tuple[str, str]:
    """The verdict on acceptance, and its evidence in words."""
    parity = parity_of(context, state)
    if parity is not None and parity.verdict == "broken":
        return FAULT, (
            f"live acceptance differs from exact replay of {context.serving_version} by {parity.difference:+.1%} "
            f"(interval {parity.lower:+.1%} to {parity.upper:+.1%}, {parity.conversations} conversations): "
            "something is broken, training would not repair it"
        )
    measurable = [domain for domain in context.domains if domain.measurable]
    floor = config.min_drop
    if fallen := [d for d in measurable if d.drop > max(floor, config.drop_z * d.drop_se)]:
        worst = max(fallen, key=lambda d: d.share * d.drop)
        return DRIFT, (
            f"acceptance of {worst.domain} is {worst.acceptance:.2f}, {worst.drop:.0%} below its reference "
            f"{worst.reference:.2f}{', and still falling' if worst.growing_s > 0 else ''}"
        )
    if shifted := [d for d in measurable if d.raw_drop > max(floor, config.drop_z * max(d.drop_se, d.raw_drop_se))]:
        worst = max(shifted, key=lambda d: d.share * d.raw_drop)
        return LOAD, (
            f"acceptance of {worst.domain} is {worst.raw_drop:.0%} lower, but not within the same sampling class and "
            "load: the mix changed, not the drafter's fit"
        )
    if not measurable:
        return NONE, "too little recent traffic to judge acceptance"
    return NONE, "acceptance is at its reference"


def parity_of(context: DecisionContext, state: PolicyState) -> ParityEvidence | None:
    """The newest parity evidence, if it is about the version that serves."""
    record = state.parity
    return record.evidence if record is not None and record.version == context.serving_version else None

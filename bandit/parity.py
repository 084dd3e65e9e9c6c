"""The fault detector: live acceptance of a version must equal its exact replay on the same conversations.

When it does not, something is broken (cache, positions, weights) and training on the evidence would be waste.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from specblock.bandit.actions import ParityRow
from specblock.bandit.config import ParityConfig
from specblock.bandit.intervals import ratio_of, two_sided_z

ParityVerdict = Literal["ok", "broken", "insufficient"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityEvidence:
    """The outcome of one check.

    Attributes:
        verdict: "ok", "broken" or "insufficient".
        difference: (live - replay) / replay of pooled acceptance length; negative: live is worse.
        lower, upper: paired interval of the difference.
        conversations, live_cycles: size of the evidence.
    """

    verdict: str
    difference: float
    lower: float
    upper: float
    live_acceptance: float
    replay_acceptance: float
    conversations: int
    live_cycles: int


def judge(rows: Sequence[ParityRow], config: ParityConfig) -> ParityEvidence:
    """Compares live with replayed cycles of the same conversations.

    Acceptance is tokens over cycles and the tokens are the same, so live over replay is replay cycles over live
    cycles; its standard error comes from the paired residuals of the conversations.
    """
    used = [row for row in rows if row.tokens > 0 and row.live_cycles > 0 and row.replay_cycles > 0]
    sums = ratio_of((row.live_cycles, row.replay_cycles) for row in used)
    tokens, live, replay = sum(row.tokens for row in used), int(sums.x), int(sums.y)
    difference, half = sums.ratio - 1.0, two_sided_z(config.confidence) * sums.se
    verdict: ParityVerdict = "ok"
    if len(used) < config.min_rows or live < config.min_cycles:
        verdict, difference, half = "insufficient", difference if used else 0.0, min(half, 1.0)
    elif abs(difference) > config.tolerance and abs(difference) > half:
        verdict = "broken"
    return ParityEvidence(
        verdict=verdict,
        difference=difference,
        lower=difference - half,
        upper=difference + half,
        live_acceptance=tokens / live if live else 0.0,
        replay_acceptance=tokens / replay if replay else 0.0,
        conversations=len(used),
        live_cycles=live,
    )

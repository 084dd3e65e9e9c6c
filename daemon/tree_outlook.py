"""What is expected of a cycle's trees while they grow: accepted drafts by node budget, with or without another block.

Before a block is drafted only the nodes it could extend are known; what the rest of the trees and the block itself will
add is learned from earlier cycles.

Legend: B requests that draft, m nodes of the last block, M raw candidates, N node budgets 1 .. N.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from specblock.drafter.forgetting import ForgettingRatio
from specblock.drafter.survival import Floats, SurvivalTable

_HALF_LIFE_CYCLES = 100.0  # that were learned from
_PRIOR_EXTRA_NODES = 3.0  # nodes another block adds, before any was seen: few, or none would be seen
_BIAS_HALF_LIFE_CYCLES = 100.0
_BIAS_PRIOR_TOKENS = 60.0
_BIAS_LIMIT = 2.0


@dataclass(slots=True)
class Growth:
    """One cycle's trees as far as they have grown.

    Attributes:
        widths: candidates of each block that was asked about, whether its scores were read or not.
        extendable: per block asked about, scores [B, m] of nodes that may be extended.
        leaf_caps: leaves extended by each later block.
        leaf_mass: expected accepted leaves among them, summed over requests.
        stop_nodes: node budget that would have been best had the trees stopped growing at each decision.
        stop_tokens: accepted drafts expected at each decision had the trees stopped growing there, before correction.
        predicted_tokens: accepted drafts expected at the last decision, before correction; None without a decision.
        kept_tokens: accepted drafts expected of the chosen budget, before correction.
    """

    widths: list[int] = field(default_factory=list)
    extendable: list[Floats] = field(default_factory=list)
    leaf_caps: list[int] = field(default_factory=list)
    leaf_mass: list[float] = field(default_factory=list)
    stop_nodes: list[float] = field(default_factory=list)
    stop_tokens: list[float] = field(default_factory=list)
    predicted_tokens: float | None = None
    kept_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class Stop:
    """Expected of trees that grow no further.

    Attributes:
        gain_by_nodes: accepted drafts of the batch by number of known nodes kept, [N].
        closed_tokens: accepted drafts of the batch among nodes that cannot be extended.
        closed_nodes: such nodes kept, per request.
        mass_m: expected accepted leaves of the batch if the best 1 .. m are extended, as far as there are any.
    """

    gain_by_nodes: Floats
    closed_tokens: float
    closed_nodes: float
    mass_m: Floats


class TreeOutlook:
    """Predicts accepted drafts from scores, and learns what scores do not say."""

    def __init__(self, survival: SurvivalTable, max_nodes: int) -> None:
        self.survival = survival
        self._max_nodes = max_nodes
        self._closed_tokens = _ratios(_HALF_LIFE_CYCLES)
        self._closed_nodes = _ratios(_HALF_LIFE_CYCLES)
        self._extra_nodes = _ratios(_HALF_LIFE_CYCLES)
        self._decision_bias = _ratios(_BIAS_HALF_LIFE_CYCLES)
        self._budget_bias = _ratios(_BIAS_HALF_LIFE_CYCLES)

    def stop(self, growth: Growth, block: int, score_Bm: Floats) -> Stop:
        """What the trees are worth as they are, and what leaves of ``block`` there are to extend."""
        growth.extendable.append(score_Bm)
        top = _best(score_Bm, self._max_nodes)
        mass_Bm = self.survival.chances(top, block > 0)
        mass_m = _summed(mass_Bm)
        known = growth.extendable
        gain_N = self._by_nodes(np.concatenate(known, axis=1), known[0].shape[1]) if block else mass_m
        requests = score_Bm.shape[0]
        return Stop(
            gain_by_nodes=gain_N,
            closed_tokens=requests * sum(self._closed_tokens[b].value() for b in range(block + 1)),
            closed_nodes=sum(self._closed_nodes[b].value() for b in range(block + 1)),
            mass_m=mass_m[: int(np.searchsorted(mass_m, mass_m[-1])) + 1] if mass_m[-1] > 0 else mass_m[:0],
        )

    def kept(self, growth: Growth, score_BM: Floats) -> Floats:
        """Accepted drafts of the batch by node budget, from all raw candidates in block order."""
        return self._by_nodes(score_BM, growth.widths[0] if growth.widths else score_BM.shape[1])

    def decision_bias(self, blocks: int) -> float:
        """Measured over predicted accepted drafts when trees ended after so many blocks, as seen when they ended."""
        return _bias(self._decision_bias[blocks])

    def budget_bias(self, blocks: int) -> float:
        """The same for predictions from all candidates: duplicates that merge count twice in those."""
        return _bias(self._budget_bias[blocks])

    def extra_nodes(self, block: int) -> float:
        """How much larger the best node budget is once ``block`` (at least 1) was drafted."""
        return max(0.0, self._extra_nodes[block].value(_PRIOR_EXTRA_NODES, 4.0))

    def chosen(self, growth: Growth, score_BM: Floats, nodes: int) -> None:
        """Learns from the final candidates what could not be known when blocks were decided on."""
        start = 0
        threshold = _best(score_BM, nodes)[:, -1:]
        for block, score_Bm in enumerate(growth.extendable):
            own = score_BM[:, start : start + score_Bm.shape[1]]
            start += score_Bm.shape[1]
            closed = (own >= threshold) & np.isfinite(own) & ~np.isfinite(score_Bm)
            tokens, count = float(self.survival.chances(own[closed], block > 0).sum()), int(closed.sum())
            self._closed_tokens[block].add(tokens, own.shape[0], 1)
            self._closed_nodes[block].add(count, own.shape[0], 1)
        for index in range(len(growth.leaf_caps)):
            # Blocks after the next one add their own share, so each step is compared with the next decision.
            after = growth.stop_nodes[index + 1] if index + 1 < len(growth.stop_nodes) else float(nodes)
            self._extra_nodes[index + 1].add(after - growth.stop_nodes[index], 1.0)

    def accepted(self, growth: Growth, tokens: int, extra: Sequence[float]) -> None:
        """Learns how far off the cycle's predictions were.

        Args:
            growth: the cycle's trees.
            tokens: drafts that the batch accepted.
            extra: of these, what each later block has brought. The rest would have been accepted without it, so what
                was expected of stopping is judged where trees went on, too: those are the promising ones.
        """
        blocks = 1 + len(growth.leaf_caps)
        for index, expected in enumerate(growth.stop_tokens[: len(extra)]):
            self._decision_bias[index + 1].add(tokens - sum(extra[index:]), expected)
        if growth.predicted_tokens is not None:
            self._decision_bias[blocks].add(tokens, growth.predicted_tokens)
        self._budget_bias[blocks].add(tokens, growth.kept_tokens)

    def _by_nodes(self, score_BM: Floats, first_width: int) -> Floats:
        """Sums of survival of the best nodes; the first ``first_width`` columns are block 1's."""
        if score_BM.shape[1] == first_width:
            return _summed(self.survival.chances(_best(score_BM, self._max_nodes), False))
        best = np.argsort(-score_BM, axis=1, kind="stable")[:, : self._max_nodes]
        return _summed(self.survival.chances(np.take_along_axis(score_BM, best, axis=1), best >= first_width))


def _best(score_Bm: Floats, count: int) -> Floats:
    """The best ``count`` scores of each request, descending."""
    return -np.sort(-score_Bm, axis=1)[:, :count]


def _summed(survival_BN: Floats) -> Floats:
    """Sums over requests of the best 1, 2, ... N."""
    result: Floats = survival_BN.sum(axis=0).cumsum()
    return result


def _ratios(half_life_cycles: float) -> defaultdict[int, ForgettingRatio]:
    return defaultdict(lambda: ForgettingRatio(half_life_cycles))


def _bias(ratio: ForgettingRatio) -> float:
    return min(max(ratio.value(1.0, _BIAS_PRIOR_TOKENS), 1 / _BIAS_LIMIT), _BIAS_LIMIT)

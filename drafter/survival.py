"""What drafts are worth, learned while serving: how often a node of a given score ends up on the accepted path.

A drafter's own log-probabilities are over- or under-confident, and differently so in later blocks, which see the target
only through earlier guesses. Both estimators below start from a prior and follow what verification accepts.

Legend: B requests, R tree rows, A accepted drafts on the longest path, N bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from specblock.cuda_ext.tree import DraftTree
from specblock.drafter.forgetting import ForgettingRatio, non_decreasing

# Lower edges of the bins of -score in nats; finer near 0, where nearly all accepted nodes are; the last bin is open.
_EDGES = (
    0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0,
    1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 9.0,
)  # fmt: skip
_CENTRES = (*((low + high) / 2 for low, high in pairwise(_EDGES)), _EDGES[-1] + 1.0)
_NUM_BINS = len(_EDGES)


class SurvivalTable:
    """P(node is on the accepted path | cumulative score, block 1 or later).

    Binned by score; each bin starts with a few pseudo-observations at ``exp(score)`` and fades with time, and bins are
    made monotone in score. Between bin centres the logarithm is interpolated, so that two scores rarely tie.

    Args:
        half_life_cycles: cycles of one request after which an observation counts half.
        prior_nodes: pseudo-observations per bin.
    """

    def __init__(self, half_life_cycles: float = 2000.0, prior_nodes: float = 4.0) -> None:
        if half_life_cycles <= 0 or prior_nodes <= 0:
            raise ValueError("survival table: half-life and prior must be above 0")
        self._half_life, self._prior_nodes = half_life_cycles, prior_nodes
        self._seen_2N = torch.zeros(2, _NUM_BINS, dtype=torch.float64)
        self._hit_2N = torch.zeros(2, _NUM_BINS, dtype=torch.float64)
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def observe(self, tree: DraftTree, accepted_rows: Tensor, num_accepted: Sequence[int]) -> None:
        """Learns from one verification.

        Args:
            tree: the verified trees.
            accepted_rows: int64 [B, A + 1], tree rows of each path, root first; padding is ignored.
            num_accepted: accepted drafts per request.
        """
        batch, width = accepted_rows.shape
        device = tree.token.device
        accepted = torch.zeros(tree.token.shape, dtype=torch.float64, device=device)
        count_B1 = torch.tensor([*num_accepted], device=device)[:, None]
        real = torch.arange(width, device=device).expand(batch, -1) <= count_B1
        accepted.scatter_(
            1, torch.where(real, accepted_rows, 0), 1.0
        )  # the root is no draft, so marking it is harmless
        drafts = tree.depth > 0
        edges = torch.tensor(_EDGES, dtype=torch.float32, device=device)
        bins = (torch.bucketize(-tree.score[drafts], edges, right=True) - 1).clamp(min=0)
        bins = bins + _NUM_BINS * (tree.block[drafts] > 0)
        hits = torch.bincount(bins, weights=accepted[drafts], minlength=2 * _NUM_BINS)
        seen = torch.bincount(bins, minlength=2 * _NUM_BINS)
        both = torch.stack([seen.to(torch.float64), hits]).cpu().view(2, 2, _NUM_BINS)
        keep = 0.5 ** (batch / self._half_life)
        self._seen_2N = keep * self._seen_2N + both[0]
        self._hit_2N = keep * self._hit_2N + both[1]
        self._tables.clear()

    def probability(self, score: Tensor, *, block: int | Tensor) -> Tensor:
        """Survival of nodes, non-decreasing in their score.

        Args:
            score: float [...], cumulative log-probability; -inf is never accepted.
            block: 0-based drafter block of all nodes, or of each (broadcast to the scores).

        Returns:
            float32, shaped like ``score``.
        """
        centres, log_2N = self._table(score.device)
        depth = -score.to(torch.float32)
        upper = torch.bucketize(depth, centres)
        lower = (upper - 1).clamp(min=0)
        upper = upper.clamp(max=_NUM_BINS - 1)
        gap = centres[upper] - centres[lower]
        part = ((depth - centres[lower]) / torch.where(gap > 0, gap, 1.0)).clamp(0.0, 1.0)
        row = int(block > 0) if isinstance(block, int) else (block > 0).to(torch.int64).expand(score.shape)
        low, high = log_2N[row, lower], log_2N[row, upper]
        beyond = (depth - centres[-1]).clamp(min=0.0)
        return (low + part * (high - low) - beyond).exp()

    def fade(self, keep: float) -> None:
        """Keeps only this share of the evidence, as when the drafter changed."""
        self._seen_2N, self._hit_2N = keep * self._seen_2N, keep * self._hit_2N
        self._tables.clear()

    def snapshot(self) -> dict[str, Any]:
        """What was learned, as plain lists."""
        return {"edges": list(_EDGES), "seen": self._seen_2N.tolist(), "hit": self._hit_2N.tolist()}

    def restore(self, data: dict[str, Any]) -> None:
        """Takes over a snapshot.

        Raises:
            ValueError: it was made with other bins.
        """
        if list(data["edges"]) != list(_EDGES):
            raise ValueError("survival table: the snapshot has other score bins")
        self._seen_2N = torch.tensor(data["seen"], dtype=torch.float64)
        self._hit_2N = torch.tensor(data["hit"], dtype=torch.float64)
        self._tables.clear()

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Bin centres [N] of -score and log survival [2, N] there."""
        if device not in self._tables:
            centres = torch.tensor(_CENTRES, dtype=torch.float64)
            weight_2N = self._seen_2N + self._prior_nodes
            mean_2N = (self._hit_2N + self._prior_nodes * (-centres).exp()) / weight_2N
            rows = [
                non_decreasing(mean[::-1], weight[::-1])[::-1]
                for mean, weight in zip(mean_2N.tolist(), weight_2N.tolist(), strict=True)
            ]
            log_2N = torch.tensor(rows, dtype=torch.float64).clamp(1e-6, 1.0).log()
            self._tables[device] = (centres.to(device, torch.float32), log_2N.to(device, torch.float32))
        return self._tables[device]


class LeafGain:
    """Extra tokens per accepted extended leaf, for each later block and number of extended leaves.

    The tree does not say which leaves were extended (their children may have been pruned), so the caller gives the
    expected number of accepted ones and the estimate is a ratio of sums. Different leaf counts are told apart because
    the best-scoring leaves are often in the middle of a chain whose continuation block 1 knows already. A count never
    tried takes the block's pooled ratio.

    Args:
        half_life_cycles: cycles of one request after which an observation counts half.
        prior_tokens: gain assumed at first.
        prior_leaves: accepted leaves that the prior, and the pooled ratio for a single count, are worth.
    """

    def __init__(self, half_life_cycles: float = 1000.0, prior_tokens: float = 0.7, prior_leaves: float = 10.0) -> None:
        self._half_life, self._prior_tokens, self._prior_leaves = half_life_cycles, prior_tokens, prior_leaves
        self._pooled: dict[int, ForgettingRatio] = {}
        self._single: dict[tuple[int, int], ForgettingRatio] = {}

    def observe(
        self,
        tree: DraftTree,
        accepted_rows: Tensor,
        num_accepted: Sequence[int],
        leaf_caps: Sequence[int],
        leaf_mass: Sequence[float],
    ) -> None:
        """Learns from one verification.

        Args:
            tree: the verified trees.
            accepted_rows: int64 [B, A + 1], tree rows of each path, root first.
            num_accepted: accepted drafts per request.
            leaf_caps: leaves extended by the second, third, ... block.
            leaf_mass: expected number of accepted leaves among them, summed over requests.
        """
        extra = extra_tokens(tree, accepted_rows, num_accepted, len(leaf_caps))
        for index, (cap, mass) in enumerate(zip(leaf_caps, leaf_mass, strict=True)):
            for ratio in self._ratios(index + 1, cap):
                ratio.add(extra[index], mass, len(num_accepted))

    def tokens(self, block: int, leaves: int) -> float:
        """Extra tokens per accepted leaf when ``block`` (0-based, at least 1) extends ``leaves``."""
        pooled, single = self._ratios(block, leaves)
        return single.value(pooled.value(self._prior_tokens, self._prior_leaves), self._prior_leaves)

    def fade(self, keep: float) -> None:
        """Keeps only this share of the evidence."""
        for ratio in (*self._pooled.values(), *self._single.values()):
            ratio.fade(keep)

    def snapshot(self) -> list[list[float]]:
        """What was learned: [block, leaves (0: pooled), numerator, denominator, count] each."""
        pooled = [((block, 0), ratio) for block, ratio in self._pooled.items()]
        return [[*key, r.numerator, r.denominator, r.count] for key, r in (*pooled, *self._single.items())]

    def restore(self, data: Sequence[Sequence[float]]) -> None:
        """Takes over a snapshot."""
        self._pooled, self._single = {}, {}
        for block, leaves, numerator, denominator, count in data:
            ratio = ForgettingRatio(self._half_life, numerator, denominator, int(count))
            if leaves:
                self._single[int(block), int(leaves)] = ratio
            else:
                self._pooled[int(block)] = ratio

    def _ratios(self, block: int, leaves: int) -> tuple[ForgettingRatio, ForgettingRatio]:
        pooled = self._pooled.setdefault(block, ForgettingRatio(self._half_life))
        return pooled, self._single.setdefault((block, leaves), ForgettingRatio(self._half_life))


def extra_tokens(tree: DraftTree, accepted_rows: Tensor, num_accepted: Sequence[int], later_blocks: int) -> list[float]:
    """Accepted drafts that only a later block can have brought, per later block, summed over requests.

    A node above an accepted node of an earlier block was proposed by that block too (merging kept the better score), so
    only nodes below the last accepted node of earlier blocks count.
    """
    device = tree.token.device
    width = accepted_rows.shape[1]
    count_B1 = torch.tensor([*num_accepted], device=device)[:, None]
    column = torch.arange(width, device=device)
    real = (column >= 1) & (column <= count_B1)
    beyond = later_blocks + 1
    rows = torch.where(real, accepted_rows, 0)
    block = torch.where(real, tree.block.gather(1, rows), beyond)
    earliest_below = block.flip(1).cummin(dim=1).values.flip(1)
    new = torch.where(block == earliest_below, block, beyond).flatten().clamp(max=beyond)
    counts: list[float] = torch.bincount(new, minlength=beyond + 1)[1:beyond].to(torch.float64).tolist()
    return counts

"""What drafts are worth, learned while serving: how often a node of a given score ends up on the accepted path.

A drafter's own log-probabilities are over- or under-confident, and differently so in later blocks, which see the
target only through earlier guesses. Both estimators below start from a prior and follow what verification accepts. They
compute on the host in numpy: for arrays of a few hundred numbers that is cheaper, and results are needed there.

Legend: B requests, R tree rows, A accepted drafts on the longest path, N bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specblock.cuda_ext.tree import DraftTree, Offers
from specblock.drafter.forgetting import ForgettingRatio, non_decreasing

# Lower edges of the bins of -score in nats; finer near 0, where nearly all accepted nodes are; the last bin is open.
_EDGES = (
    0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0,
    1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 9.0,
)  # fmt: skip
_CENTRES = np.array([*((low + high) / 2 for low, high in pairwise(_EDGES)), _EDGES[-1] + 1.0])
_CENTRES.flags.writeable = False
_LAST_CENTRE = float(_CENTRES[-1])
_NUM_BINS = len(_EDGES)

Floats = NDArray[np.float64]


class SurvivalTable:
    """P(node is on the accepted path | cumulative score, block 1 or later).

    Binned by score; each bin starts with a few pseudo-observations at ``exp(score)`` and fades with time, and bins are
    made monotone in score. Between bin centres the logarithm is interpolated, so that two scores rarely tie.

    Args:
        half_life_cycles: cycles of one request that were learned from, after which an observation counts half.
        prior_nodes: pseudo-observations per bin.
    """

    def __init__(self, half_life_cycles: float = 500.0, prior_nodes: float = 4.0) -> None:
        if half_life_cycles <= 0 or prior_nodes <= 0:
            raise ValueError("survival table: half-life and prior must be above 0")
        self._half_life, self._prior_nodes = half_life_cycles, prior_nodes
        self._seen_2N: Floats = np.zeros((2, _NUM_BINS))
        self._hit_2N: Floats = np.zeros((2, _NUM_BINS))
        self._log_2N: Floats | None = None

    def observe(self, tree: DraftTree, accepted_rows: Tensor, num_accepted: Sequence[int]) -> None:
        """Learns from one verification.

        Args:
            tree: the verified trees.
            accepted_rows: int64 [B, A + 1], tree rows of each path, root first; padding is ignored.
            num_accepted: accepted drafts per request.
        """
        depth_BR, block_BR = tree.depth.cpu().numpy(), tree.block.cpu().numpy()
        accepted = np.zeros(depth_BR.shape)
        rows = np.where(_on_path(accepted_rows.shape[1], num_accepted), accepted_rows.cpu().numpy(), 0)
        np.put_along_axis(accepted, rows, 1.0, axis=1)  # the root is no draft, so marking it is harmless
        drafts = depth_BR > 0
        bins = np.searchsorted(_EDGES, -tree.score.cpu().numpy()[drafts], side="right") - 1
        bins = bins.clip(min=0) + _NUM_BINS * (block_BR[drafts] > 0)
        keep = 0.5 ** (depth_BR.shape[0] / self._half_life)
        self._seen_2N = keep * self._seen_2N + _histogram(bins, None)
        self._hit_2N = keep * self._hit_2N + _histogram(bins, accepted[drafts])
        self._log_2N = None

    def probability(self, score: Tensor, *, block: int | Tensor) -> Tensor:
        """Survival of nodes, non-decreasing in their score.

        Args:
            score: float [...], cumulative log-probability; -inf is never accepted.
            block: 0-based drafter block of all nodes, or of each (broadcast to the scores).

        Returns:
            float32, shaped like ``score``.
        """
        later = block > 0 if isinstance(block, int) else (block > 0).expand(score.shape).cpu().numpy()
        result = self.chances(score.to(torch.float64).cpu().numpy(), later)
        return torch.as_tensor(result).to(score.device, torch.float32)

    def chances(self, score: Floats, later: bool | NDArray[np.bool_]) -> Floats:
        """The same on the host; ``later`` says which nodes are not block 1's (one for all, or one each)."""
        log_2N = self._table()
        depth = -score
        if isinstance(later, bool):
            log_p = np.interp(depth, _CENTRES, log_2N[int(later)])
        else:
            log_p = np.where(later, *(np.interp(depth, _CENTRES, log_N) for log_N in log_2N[::-1]))
        answer: Floats = np.exp(log_p - np.maximum(depth - _LAST_CENTRE, 0.0))
        return answer

    def fade(self, keep: float) -> None:
        """Keeps only this share of the evidence, as when the drafter changed."""
        self._seen_2N, self._hit_2N = keep * self._seen_2N, keep * self._hit_2N
        self._log_2N = None

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
        self._seen_2N = np.array(data["seen"])
        self._hit_2N = np.array(data["hit"])
        self._log_2N = None

    def _table(self) -> Floats:
        """Log survival [2, N] at the bin centres."""
        if self._log_2N is None:
            weight_2N = self._seen_2N + self._prior_nodes
            mean_2N = (self._hit_2N + self._prior_nodes * np.exp(-_CENTRES)) / weight_2N
            rows = [
                non_decreasing(mean[::-1], weight[::-1])[::-1]
                for mean, weight in zip(mean_2N.tolist(), weight_2N.tolist(), strict=True)
            ]
            self._log_2N = np.log(np.clip(rows, 1e-6, 1.0))
        return self._log_2N


class LeafGain:
    """Extra tokens per accepted extended leaf, for each later block and number of extended leaves.

    The tree does not say which leaves were extended (their children may have been pruned), so the caller gives the
    expected number of accepted ones and the estimate is a ratio of sums. Different leaf counts are told apart because
    the best-scoring leaves are often in the middle of a chain whose continuation block 1 knows already. A count never
    tried takes the block's pooled ratio.

    Args:
        half_life_cycles: cycles of one request that were learned from, after which an observation counts half.
        prior_tokens: gain assumed at first.
        prior_leaves: accepted leaves that the prior, and the pooled ratio for a single count, are worth.
    """

    def __init__(self, half_life_cycles: float = 250.0, prior_tokens: float = 0.7, prior_leaves: float = 10.0) -> None:
        self._half_life, self._prior_tokens, self._prior_leaves = half_life_cycles, prior_tokens, prior_leaves
        self._pooled: dict[int, ForgettingRatio] = {}
        self._single: dict[tuple[int, int], ForgettingRatio] = {}

    def observe(
        self, extra: Sequence[float], requests: int, leaf_caps: Sequence[int], leaf_mass: Sequence[float]
    ) -> None:
        """Learns from one verification.

        Args:
            extra: ``extra_tokens`` of it.
            requests: that drafted.
            leaf_caps: leaves extended by the second, third, ... block.
            leaf_mass: expected number of accepted leaves among them, summed over requests.
        """
        for index, (cap, mass) in enumerate(zip(leaf_caps, leaf_mass, strict=True)):
            for ratio in self._ratios(index + 1, cap):
                ratio.add(extra[index], mass, requests)

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


@dataclass(frozen=True, slots=True)
class PathNodes:
    """Accepted paths through trees: parent row and token of every row, int64 [B, R], and the paths' rows [B, A + 1]."""

    parent: Tensor
    token: Tensor
    rows: Tensor


def first_blocks(paths: PathNodes, offers: Offers, widths: Sequence[int]) -> NDArray[np.int64]:
    """The first block that proposed each node of the accepted paths, int64 [B, A + 1].

    ``DraftTree.block`` says whose score a node has, and a later block often scores better what an earlier one proposed
    too.

    Args:
        paths: of the B requests that drafted. What padding and the root give is no block.
        offers: everything proposed for them, block by block.
        widths: candidates of each block.
    """
    parent_BM, token_BM = offers.parent_row.cpu().numpy(), offers.token.cpu().numpy()
    rows = paths.rows.cpu().numpy()
    parent_BA, token_BA = (np.take_along_axis(t.cpu().numpy(), rows, axis=1) for t in (paths.parent, paths.token))
    same = (parent_BM[:, None] == parent_BA[:, :, None]) & (token_BM[:, None] == token_BA[:, :, None])
    first: NDArray[np.int64] = np.where(same, np.repeat(np.arange(len(widths)), widths), len(widths)).min(axis=2)
    return first


def extra_tokens(first_BA: NDArray[np.int64], num_accepted: Sequence[int], later_blocks: int) -> list[float]:
    """Accepted drafts that only a later block can have brought, per later block, summed over requests.

    Whatever lies above a node of an earlier block was proposed by that block too: only what is below the last such node
    counts.

    Args:
        first_BA: ``first_blocks`` of the paths.
        num_accepted: accepted drafts per request.
        later_blocks: how many there are.
    """
    beyond = later_blocks + 1
    real = _on_path(first_BA.shape[1], num_accepted)
    real[:, 0] = False  # the root is no draft
    along = np.where(real, first_BA, beyond).clip(max=beyond)
    earliest_below = np.minimum.accumulate(along[:, ::-1], axis=1)[:, ::-1]
    counts: list[float] = np.bincount(along[along == earliest_below], minlength=beyond + 1)[1:beyond].tolist()
    return counts


def _on_path(width: int, num_accepted: Sequence[int]) -> NDArray[np.bool_]:
    """bool [B, width]: columns of paths so wide that are no padding, the root's included."""
    real: NDArray[np.bool_] = np.arange(width) <= np.array(num_accepted)[:, None]
    return real


def _histogram(bins: NDArray[np.int64], weights: Floats | None) -> Floats:
    return np.bincount(bins, weights, minlength=2 * _NUM_BINS).astype(np.float64).reshape(2, _NUM_BINS)

"""What a verification hands back, and the compressed target distribution kept for training.

Legend: B requests, A accepted drafts on the longest path, F fused feature size, K kept tokens per position,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specblock.cuda_ext.native import has_kernel
from specblock.cuda_ext.ranking import most_probable


@dataclass(frozen=True, slots=True)
class TopLogProbs:
    """The most probable tokens of raw logits at temperature 1.

    Attributes:
        ids: int32 [..., K], most probable first.
        log_probs: float32 [..., K], normalised over the whole vocabulary.
        logsumexp: float32 [...], of the raw logits.
    """

    ids: Tensor
    log_probs: Tensor
    logsumexp: Tensor


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The outcome of one verification; nothing is committed yet.

    Column j of ``rows``, ``features`` and ``top`` belongs to the token *before* ``tokens[:, j]``: column 0 is the root.
    Columns beyond ``num_accepted[b]`` are padding (valid rows of the batch, without meaning).

    Attributes:
        paths: chosen tokens per request, accepted drafts then the bonus (host).
        tokens: int64 [B, A + 1], the same, padded with -1.
        num_accepted: accepted drafts per request, bonus excluded (host).
        rows: int64 [B, A + 1], tree rows of the path, root first; column j is padded with j.
        features: [B, A + 1, F], target features of those rows.
        top: target distribution at those rows, [B, A + 1, ...].
    """

    paths: tuple[tuple[int, ...], ...]
    tokens: Tensor
    num_accepted: list[int]
    rows: Tensor
    features: Tensor
    top: TopLogProbs

    @property
    def top_ids(self) -> Tensor:
        """int32 [B, A + 1, K]."""
        return self.top.ids

    @property
    def top_log_probs(self) -> Tensor:
        """float32 [B, A + 1, K]."""
        return self.top.log_probs

    @property
    def logsumexp(self) -> Tensor:
        """float32 [B, A + 1]."""
        return self.top.logsumexp


def topk_log_probs(logits: Tensor, k: int = 32) -> TopLogProbs:
    """The ``min(k, V)`` most probable tokens of raw logits [..., V], finite or -inf, before any processing."""
    k = min(k, logits.shape[-1])
    if k > 0 and logits.is_cpu and logits.dtype == torch.float32 and has_kernel("draft_top", logits):
        best = most_probable(logits.reshape(-1, logits.shape[-1]), k)
        shape = logits.shape[:-1]
        log_probs = best.log_prob.view(*shape, k)
        total = best.top.view(shape) - log_probs[..., 0]
        return TopLogProbs(best.index.view(*shape, k).to(torch.int32), log_probs, total)
    return topk_log_probs_reference(logits, k)


def topk_log_probs_reference(logits: Tensor, k: int) -> TopLogProbs:
    """``topk_log_probs`` on any device; equal logits come in any order."""
    logits = logits.to(torch.float32)
    total = torch.logsumexp(logits, dim=-1)
    values, ids = torch.topk(logits, min(k, logits.shape[-1]), dim=-1)
    return TopLogProbs(ids.to(torch.int32), values - total[..., None], total)

"""The best tokens of draft logits, ranked by the target's own noise where it is known.

Legend: N rows, V draft vocabulary, W tokens wanted. Source: design section 4.1 (shared noise).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from specblock.cuda_ext.native import has_kernel
from specblock.cuda_ext.noise import NoiseRows
from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams

_CUDA_WANTED = 128  # the most tokens that the CUDA kernel finds


@dataclass(frozen=True, slots=True)
class BestTokens:
    """What stands out in each row.

    Attributes:
        index: int64 [N, W], indices of the best tokens, best first.
        log_prob: float32 [N, W], their log-probabilities under the ranking.
        top: float32 [N, T], the largest logits, descending.
    """

    index: Tensor
    log_prob: Tensor
    top: Tensor


def best_tokens(
    logits: Tensor,
    noise: NoiseRows | None,
    ids: Tensor | None,
    sampling: SamplingBatch,
    scale: float,
    width: int,
    num_top: int,
) -> BestTokens:
    """Ranks draft logits.

    Args:
        logits: [N, V], of any float type.
        noise: the target's Gumbel noise of the N rows, or None to rank by the logits alone.
        ids: int64 [V], the token of every draft logit; None: its own index.
        sampling: parameters of the rows' requests: of B requests the rows come one after the other, N / B of each.
            Those with temperature 0 are ranked by the logits alone.
        scale: nats, see ``perturbed``.
        width: W, at most V.
        num_top: T, at most V.
    """
    if logits.is_cpu or logits.dtype == torch.float64:  # the CUDA kernel reads narrower types and computes alike
        logits = logits.to(torch.float32)
    if not logits.is_cpu or not has_kernel("draft_top", logits):  # the CPU's takes a request's parameters once
        sampling = sampling.repeated(logits.shape[0] // max(1, len(sampling.temperature)))
    fits = logits.is_cpu or max(width, num_top) <= _CUDA_WANTED
    if fits and has_kernel("draft_top", logits):
        found = torch.ops.specblock.draft_top(
            logits.contiguous(),
            noise.storage if noise else None,
            noise.index if noise else None,
            ids if noise else None,
            *sampling.law,
            scale,
            width,
            num_top,
        )
        return BestTokens(*found)
    return ranked_reference(logits.to(torch.float32), noise, ids, sampling, scale, width, num_top)


def most_probable(logits: Tensor, count: int) -> BestTokens:
    """The ``count`` best tokens of float32 logits [N, V] by themselves; ``top`` is the largest logit."""
    return best_tokens(logits, None, None, _plain(logits.device), 1.0, count, 1)


@functools.cache
def _plain(device: torch.device) -> SamplingBatch:
    with torch.inference_mode(False):
        return SamplingBatch.of([SamplingParams(temperature=0.0)], device)


def ranked_reference(
    logits: Tensor,
    noise: NoiseRows | None,
    ids: Tensor | None,
    sampling: SamplingBatch,
    scale: float,
    width: int,
    num_top: int,
) -> BestTokens:
    """The readable definition of ``best_tokens``, for any device; equal scores come in any order."""
    top = torch.topk(logits, num_top, dim=-1).values
    score = logits
    if noise is not None:
        gumbel = noise.rows() if ids is None else noise.rows()[:, ids]
        score = perturbed(logits, top, gumbel.to(torch.float32), sampling, scale)
    best = torch.topk(score, width, dim=-1)
    return BestTokens(best.indices, best.values - torch.logsumexp(score, dim=-1, keepdim=True), top)


def perturbed(logits: Tensor, top: Tensor, gumbel: Tensor, sampling: SamplingBatch, scale: float) -> Tensor:
    """Draft logits ranked with the target's own noise: ``(log q / T + Gumbel) / scale`` for sampled rows.

    The target will choose arg-max(log p + Gumbel); with the noise known, what is uncertain is only how far q is from
    p. ``scale`` is that distance in nats, so the result reads as the drafter's log-odds of the target's choice.
    Tokens that the request's top-k, min-p or top-p surely remove are dropped (top-p only where the 20 best decide it).

    Args:
        logits: float32 [N, V].
        top: float32 [N, T], the largest of them, descending.
        gumbel: float32 [N, V].
        sampling: parameters of the N rows.
        scale: nats.

    Returns:
        float32 [N, V]; greedy rows are the logits themselves.
    """
    greedy = (sampling.temperature == 0)[:, None]
    temperature = torch.where(greedy, 1.0, sampling.temperature.to(torch.float32)[:, None])
    scaled, scaled_top = logits / temperature, top / temperature
    normaliser = torch.logsumexp(scaled, dim=-1, keepdim=True)
    before = torch.cumsum((scaled_top - normaliser).exp(), dim=-1) - (scaled_top - normaliser).exp()
    kept = (before < sampling.top_p.to(torch.float32)[:, None]) | (sampling.top_p >= 1)[:, None]
    floor = torch.where(kept, scaled_top, torch.inf).amin(dim=-1, keepdim=True)
    floor = torch.where(kept.all(dim=-1, keepdim=True), -torch.inf, floor)
    floor = torch.maximum(floor, scaled_top[:, :1] + sampling.min_p.to(torch.float32)[:, None].log())
    top_k = sampling.top_k[:, None]
    by_rank = scaled_top.gather(-1, top_k.clamp(1, top.shape[-1]) - 1)
    floor = torch.where((top_k > 0) & (top_k <= top.shape[-1]), torch.maximum(floor, by_rank), floor)
    score = ((scaled + gumbel) / scale).masked_fill(scaled < floor, -torch.inf)
    return torch.where(greedy, logits, score)

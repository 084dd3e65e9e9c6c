"""Soft cross-entropy through the output head, a few rows at a time: all logits would be most of a step's memory.

Every pass computes logits, loss and gradient while its numbers are in the cache, so the loss is a leaf for autograd
that already knows its gradient. ``head_loss_reference`` is the definition.

Legend: R labelled rows, K slots, H hidden, Vd draft vocabulary, k stored target log-probabilities.
Source: method reference 6.3; computing gradients in the forward pass of a chunked head as Liger Kernel does
(arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from specblock.drafter.labels import BlockLabels, agreed, slot_weights

_PASS_VALUES = {"cpu": 1 << 21, "cuda": 1 << 26}
_FEWEST_ROWS = 64
_LEAST_WEIGHT = 1e-6


@dataclass(frozen=True, slots=True)
class HeadLoss:
    """Of one block.

    Attributes:
        loss: scalar with gradient: the slots' weighted mean cross-entropies times their factors, summed.
        top1: float32 [K], weighted share of rows whose best token is the target's.
        rank: int64 [R, K], 1-based rank of the target's best token among the logits.
        top: float32 [R, K, m], the largest logits, descending.
    """

    loss: Tensor
    top1: Tensor
    rank: Tensor
    top: Tensor


def head_loss(
    normed_RKH: Tensor,
    head: Tensor,
    labels: BlockLabels,
    bias_BV: Tensor | None,
    factors: Sequence[float],
    prefix: str,
    top_count: int,
) -> HeadLoss:
    """Loss of labelled rows.

    Args:
        normed_RKH: what the head multiplies.
        head: [Vd, H].
        labels: of the rows.
        bias_BV: float32 per window of the batch, added to the logits, or None; no gradient goes there.
        factors: of each slot.
        prefix: see ``LossSettings``.
        top_count: m, how many logits are handed on; 0 for none.
    """
    given = (labels, bias_BV, tuple(factors), prefix, top_count, torch.is_grad_enabled())
    return HeadLoss(*_HeadLoss.apply(normed_RKH, head, given))  # type: ignore[no-untyped-call]


def head_loss_reference(
    normed_RKH: Tensor,
    head: Tensor,
    labels: BlockLabels,
    bias_BV: Tensor | None,
    factors: Sequence[float],
    prefix: str,
    top_count: int,
) -> HeadLoss:
    """``head_loss`` of all rows at once."""
    logits = F.linear(normed_RKH, head).float()
    if bias_BV is not None:
        logits = logits + bias_BV[labels.row][:, None]
    log_q = torch.log_softmax(logits, dim=-1)
    cross_entropy = -(labels.probs * log_q.gather(-1, labels.ids)).sum(dim=-1)
    with torch.no_grad():
        rank = 1 + (logits > logits.gather(-1, labels.ids[..., :1])).sum(dim=-1)
        weight = slot_weights(log_q, rank == 1, labels, prefix)
        total = weight.sum(dim=0).clamp(min=_LEAST_WEIGHT)
    means = (weight * cross_entropy).sum(dim=0) / total
    top = torch.topk(logits.detach(), top_count, dim=-1).values
    loss = (means * torch.tensor(factors, device=means.device)).sum()
    return HeadLoss(loss, (weight * (rank == 1)).sum(dim=0) / total, rank, top)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, normed: Tensor, head: Tensor, given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        labels, bias_BV, factors, prefix, top_count, with_gradient = given
        (rows, width, _), size, device = normed.shape, head.shape[0], normed.device
        kind = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else head.dtype
        weight = head.to(kind)
        loss, top1 = torch.zeros((), device=device), torch.zeros(width, device=device)
        rank = torch.empty(rows, width, dtype=torch.int64, device=device)
        top = torch.empty(rows, width, top_count, device=device)
        wants_rows, wants_head = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        of_rows = torch.empty_like(normed) if wants_rows else None
        of_head = torch.zeros_like(head, dtype=torch.float32) if wants_head else None
        count = max(_FEWEST_ROWS, _PASS_VALUES.get(device.type, _PASS_VALUES["cuda"]) // size)
        reached = torch.ones(rows, device=device)
        for slot in range(width):
            weight_R = reached * labels.usable[:, slot]
            total = weight_R.sum().clamp(min=_LEAST_WEIGHT)
            scale = factors[slot] / total
            for start in range(0, rows, count):
                part = slice(start, start + count)
                x, ids, probs = normed[part, slot].to(kind), labels.ids[part, slot], labels.probs[part, slot]
                logits = F.linear(x, weight).float()
                if bias_BV is not None:
                    logits += bias_BV[labels.row[part]]
                own = rank[part, slot] = 1 + (logits > logits.gather(1, ids[:, :1])).sum(dim=1)
                if top_count:
                    top[part, slot] = torch.topk(logits, top_count, dim=1).values
                log_z = torch.logsumexp(logits, dim=1, keepdim=True)
                log_actual = (logits.gather(1, labels.actual[part, slot].clamp(min=0)[:, None]) - log_z)[:, 0]
                share = (scale * weight_R[part])[:, None]
                loss -= (share * probs * (logits.gather(1, ids) - log_z)).sum()
                hit = own == 1
                top1[slot] += (weight_R[part] * hit).sum()
                usable, log_p = labels.usable[part, slot], labels.actual_log_prob[part, slot]
                reached[part] *= agreed(prefix, hit, log_actual, log_p, usable)
                if of_rows is None and of_head is None:
                    continue
                slope = (logits - log_z).exp_().mul_(share * probs.sum(dim=1, keepdim=True))
                slope = slope.scatter_add_(1, ids, -share * probs).to(kind)
                if of_rows is not None:
                    of_rows[part, slot] = slope @ weight
                if of_head is not None:
                    of_head += slope.T @ x
            top1[slot] /= total
        ctx.save_for_backward(of_rows, of_head)
        ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(top1, rank, top)
        return loss, top1, rank, top

    @staticmethod
    def backward(ctx: Any, slope: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, None]:
        of_rows, of_head = ctx.saved_tensors
        return (
            None if of_rows is None else of_rows * slope.to(of_rows.dtype),
            None if of_head is None else (of_head * slope).to(ctx.head_dtype),
            None,
        )

"""What a block's rows are trained on: where there are labels, and how much each slot counts.

Legend: B batch, T positions, N positions of a block, K slots, k stored target log-probabilities, R labelled rows.
Source: method reference 6.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specblock.drafter.window import TrainingBatch


def labelled_positions(valid: Tensor) -> Tensor:
    """Positions with a label, in order, int64 [B, N]; rows with fewer than N are filled up with others."""
    count = max(1, int(valid.sum(dim=1).max()))
    return torch.sort(valid.to(torch.uint8), dim=1, descending=True, stable=True).indices[:, :count]


def later_positions(valid: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Positions at which later blocks train: a random ``share`` of each row's valid ones.

    Args:
        valid: bool [B, T].
        share: 1 takes every position, valid or not, in order.
        generator: on the CPU.

    Returns:
        int64 [B, N]; rows with fewer than N valid positions are filled up with others.
    """
    if share == 1:
        return torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    count = max(1, round(share * int(valid.sum(dim=1).max())))
    keys = torch.rand(valid.shape, generator=generator).to(valid.device) + valid
    return torch.topk(keys, count, dim=1).indices


@dataclass(frozen=True, slots=True)
class BlockLabels:
    """Labels of one block, selected rows only.

    Attributes:
        where: int64 [R], flat places in the block's rows.
        row: int64 [R], their window's place in the batch.
        ids: int64 [R, K, k], the target's most probable tokens as draft ids; 0 where they have none.
        probs: float32 [R, K, k], renormalised over the draft vocabulary; 0 where there is no draft id.
        usable: bool [R, K], there is a label.
        actual: int64 [R, K], draft id of the token that came, -1 if it is not among the labels.
        actual_log_prob: float32 [R, K], the target's log-probability of it, then -inf.
    """

    where: Tensor
    row: Tensor
    ids: Tensor
    probs: Tensor
    usable: Tensor
    actual: Tensor
    actual_log_prob: Tensor

    @classmethod
    def of(
        cls,
        batch: TrainingBatch,
        draft_ids: Tensor,
        usable: Tensor,
        positions: Tensor,
        offset: int,
        width: int,
    ) -> BlockLabels:
        """positions: int64 [B, N], where the block was computed."""
        size, num_positions = usable.shape
        # Eligible positions: A_{i,0} = l_i m_i, un-shifted for every block (method reference 6.3).
        where = usable.gather(1, positions).flatten().nonzero().squeeze(1)
        row, position = where // positions.shape[1], positions.flatten()[where]
        label = position[:, None] + offset + torch.arange(width, device=where.device)
        inside = label < num_positions
        flat = row[:, None] * num_positions + label.clamp(max=num_positions - 1)
        ids = draft_ids.flatten(0, 1)[flat]
        log_probs = batch.label_log_probs.flatten(0, 1)[flat]
        probs = torch.where(ids >= 0, log_probs, -torch.inf)
        probs = torch.nan_to_num(torch.softmax(probs, dim=-1))
        actual_target = batch.tokens.gather(
            1, torch.arange(2, num_positions + 2, device=where.device).clamp(max=num_positions).expand(size, -1)
        ).flatten()[flat]
        match = batch.label_ids.flatten(0, 1)[flat] == actual_target[..., None]
        actual_log_prob = torch.where(match, log_probs, -torch.inf).amax(dim=-1)
        actual = torch.where(match, ids, -1).amax(dim=-1)
        actual_log_prob = torch.where(actual >= 0, actual_log_prob, -torch.inf)  # the drafter cannot have said it
        return cls(where, row, ids.clamp(min=0), probs, usable.flatten()[flat] & inside, actual, actual_log_prob)


def agreed(prefix: str, hit: Tensor, log_q: Tensor, log_p: Tensor, usable: Tensor) -> Tensor:
    """Whether, or how likely, text goes on behind a slot, float32: what the slots after it are weighed by.

    Args:
        prefix: see ``LossSettings``.
        hit: bool, the drafter's best token is the target's arg-max.
        log_q: the drafter's log-probability of the token that came.
        log_p: the target's; -inf where it is not among the labels.
        usable: bool, the slot has a label.
    """
    step = hit.float() if prefix == "argmax" else (log_q - log_p).clamp(max=0).exp() * log_p.isfinite()
    return step * usable


def slot_weights(log_q: Tensor, hit: Tensor, labels: BlockLabels, prefix: str) -> Tensor:
    """How much each slot counts, float32 [R, K]: whether, or how likely, it is reached and labelled.

    Args:
        log_q: [R, K, Vd], the drafter's log-probabilities.
        hit: bool [R, K], it agrees with the target's arg-max.
        labels: of the rows.
        prefix: see ``LossSettings``.
    """
    actual = log_q.gather(-1, labels.actual.clamp(min=0)[..., None]).squeeze(-1)
    step = agreed(prefix, hit, actual, labels.actual_log_prob, labels.usable)
    reached = torch.cumprod(torch.cat([torch.ones_like(step[:, :1]), step[:, :-1]], dim=1), dim=1)
    return reached * labels.usable

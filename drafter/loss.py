"""Multi-block training loss: valid-prefix-masked soft cross-entropy and the rank loss.

Legend: B batch, T positions, K slots, H hidden, k stored target log-probabilities, Vd draft vocabulary.
Source: method reference 6.2 - 6.5 and masks of 1.6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from specblock.drafter.layers import rows_of
from specblock.drafter.model import RANK_TOP, rank_class, rank_features
from specblock.drafter.network import DraftNetwork
from specblock.drafter.window import TrainingBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """Weights of the loss.

    Attributes:
        slot_decay: weight of slot k is ``slot_decay ** k``.
        block_decay: weight of block b is ``block_decay ** b``; EAGLE-3 weighs its unrolled steps with 0.8.
        rank_weight: weight of the rank loss.
        prefix: which positions a slot counts on. "argmax": all earlier slots of the block agree with the target's
            arg-max (published). "acceptance": weighted by the probability that earlier slots would be accepted,
            ``min(1, q/p)`` of the token that really came, which is what sampling at temperature 1 meets.
        later_share: share of a conversation's labelled positions, drawn anew at every step, on which blocks after
            the first train. Nothing attends to the other rows, so a small share makes steps cheaper without touching
            the first block; the loss stays the same in expectation up to the share's normalisation.
    """

    slot_decay: float = 0.8
    block_decay: float = 1.0
    rank_weight: float = 1.0
    prefix: str = "argmax"
    later_share: float = 1.0

    def __post_init__(self) -> None:
        if self.prefix not in ("argmax", "acceptance"):
            raise ValueError("prefix: must be argmax or acceptance")
        if not 0 < self.later_share <= 1:
            raise ValueError("later_share: must be above 0 and at most 1")


@dataclass(frozen=True, slots=True)
class LossReport:
    """total: scalar with gradient; draft, rank: detached; slot_top1 [blocks, K]: share of top-1 agreement."""

    total: Tensor
    draft: Tensor
    rank: Tensor
    slot_top1: Tensor


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


def train_blocks(
    model: DraftNetwork,
    batch: TrainingBatch,
    consumed: list[int],
    later: Tensor | None = None,
    wanted: Tensor | None = None,
) -> list[Tensor]:
    """Hidden states u of every block, all positions in parallel (method reference 6.2).

    Args:
        model: the drafter.
        batch: windows.
        consumed: M_b, slots consumed from block b before block b+1 starts; ``len(consumed) + 1`` blocks are run.
        later: int64 [B, M], where blocks after the first are computed, as places in ``wanted``; None: all N.
        wanted: int64 [B, N], the positions at which the first block's u is; the others are only looked at. None: all T.

    Returns:
        Block 1: [B, N, K, H]; later ones [B, M, K, H].
    """
    tokens, num_positions = batch.tokens, batch.features.shape[1]
    every = torch.arange(num_positions, device=tokens.device).expand(tokens.shape[0], -1)
    asked = every if wanted is None else wanted
    places = torch.arange(asked.shape[1], device=tokens.device).expand(tokens.shape[0], -1) if later is None else later
    later = asked.gather(1, places)
    rows_cached: list[list[tuple[Tensor, Tensor]]] = []  # [block][layer] rotated keys and values
    outputs: list[Tensor] = []
    offset = 0
    for block in range(len(consumed) + 1):
        positions = every if block == 0 else later
        if block == 0:
            x = model.first_inputs(batch.features.to(model.norm.weight.dtype), tokens[:, 1:])
        else:
            offset += consumed[block - 1]
            parents = outputs[-1][:, :, consumed[block - 1] - 1]
            if block == 1:
                parents = parents.gather(1, places[..., None].expand(-1, -1, parents.shape[-1]))
            x = model.later_inputs(parents, tokens.gather(1, (later + 1 + offset).clamp(max=num_positions)))
        rows_cached.append([])
        attention = _BlockAttention(model, rows_cached, consumed[:block], later, num_positions, wanted)
        rotary = model.rotary_tables(model.rotary_index(positions, offset))
        outputs.append(model.run_layers(x, rotary, attention, wanted if block == 0 else None))
    return outputs


class _BlockAttention:
    """Attention of one training block: earlier positions' block-1 rows, own ancestors' slots, own rows causally.

    Keys are the rows of all blocks so far under one mask; the kernel never materialises the scores, which costs less
    than splitting the block-diagonal part off.
    """

    def __init__(
        self,
        model: DraftNetwork,
        cached: list[list[tuple[Tensor, Tensor]]],
        consumed: list[int],
        later: Tensor,
        num_positions: int,
        wanted: Tensor | None,
    ) -> None:
        self._cached = cached
        self._mask = self._wanted_mask = None
        width = model.config.num_slots
        if consumed:
            self._mask = later_block_mask(later, num_positions, width, consumed, model.config.published_mask)[:, None]
        elif (rows := rows_of(wanted, num_positions, width)) is not None:
            self._wanted_mask = (torch.arange(num_positions * width, device=rows.device) <= rows[:, :, None])[:, None]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self._cached[-1].append((key, value))
        group = query.shape[1] // key.shape[1]
        keys, values = (torch.cat([block[layer][i] for block in self._cached], dim=2) for i in (0, 1))
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
        # On CPUs the backward pass of this kernel is two to three times faster in float32 than in bfloat16.
        kind = torch.float32 if query.device.type == "cpu" and query.dtype == torch.bfloat16 else query.dtype
        query, keys, values = query.to(kind), keys.to(kind), values.to(kind)
        everyone = self._wanted_mask is None or query.shape[2] == keys.shape[2]
        mask = self._mask if everyone else self._wanted_mask
        with torch.autocast(query.device.type, enabled=False):
            mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=mask is None)
        return mixed.transpose(1, 2)


def later_block_mask(later: Tensor, num_positions: int, width: int, consumed: list[int], published: bool) -> Tensor:
    """bool [B, N * K, T * K + len(consumed) * N * K]: what rows of a later block see of every block so far.

    Args:
        later: int64 [B, N], positions of the rows.
        num_positions: T.
        width: K.
        consumed: slots consumed from each previous block.
        published: also show earlier positions' rows of the current block (method reference 9.4).
    """
    slots = torch.arange(width, device=later.device)
    first = torch.arange(num_positions, device=later.device).repeat_interleave(width)  # position of block-1 rows
    row = later.repeat_interleave(width, dim=1)  # [B, NK]
    row_slot, first_slot = slots.repeat(later.shape[1]), slots.repeat(num_positions)
    before, same = first < row[..., None], row[:, None, :] == row[..., None]
    seen = [before | ((first == row[..., None]) & (first_slot < consumed[0]))]
    seen.extend(same & (row_slot < count) for count in consumed[1:])
    current = same & (row_slot[None, :] <= row_slot[:, None])
    if published:
        current = current | (row[:, None, :] < row[..., None])
    return torch.cat([*seen, current], dim=2)


def training_loss(
    model: DraftNetwork,
    batch: TrainingBatch,
    consumed: list[int],
    settings: LossSettings,
    generator: torch.Generator | None = None,
) -> LossReport:
    """Total loss of one batch over ``len(consumed) + 1`` blocks.

    Args:
        model: the drafter.
        batch: padded windows.
        consumed: M_b per transition; see :func:`train_blocks`.
        settings: weights.
        generator: draws the positions of later blocks.
    """
    width = model.config.num_slots
    wanted = _wanted(model, batch, len(consumed) + 1)
    later = later_positions(batch.valid.gather(1, wanted), settings.later_share, generator)
    hidden = train_blocks(model, batch, consumed, later, wanted)
    draft_ids = model.to_draft[batch.label_ids]
    usable = batch.valid & (draft_ids[..., 0] >= 0)  # m_j: the target's arg-max is in the draft vocabulary
    bias_BV = model.token_bias.of(batch.domains)
    offsets = [sum(consumed[:b]) for b in range(len(hidden))]
    draft_terms, rank_terms, top1 = [], [], []
    for number, (u, offset) in enumerate(zip(hidden, offsets, strict=True)):
        positions = wanted.gather(1, later) if number else wanted
        block = BlockLabels.of(batch, draft_ids, usable, positions, offset, width)
        terms = _block_terms(model, u, block, bias_BV, settings)
        draft_terms.append(terms.draft)
        rank_terms.append(terms.rank)
        top1.append(terms.top1)
    decay = settings.slot_decay ** torch.arange(width, device=batch.tokens.device)
    block_decay = settings.block_decay ** torch.arange(len(hidden), device=batch.tokens.device)
    draft = (torch.stack(draft_terms) * decay * block_decay[:, None]).sum()
    rank = torch.stack(rank_terms).sum()
    return LossReport(draft + settings.rank_weight * rank, draft.detach(), rank.detach(), torch.stack(top1))


def _wanted(model: DraftNetwork, batch: TrainingBatch, num_blocks: int) -> Tensor:
    """Positions [B, N] whose u the loss needs: labelled ones, and all where a later block looks at its other rows."""
    if num_blocks > 1 and model.config.published_mask:
        return torch.arange(batch.valid.shape[1], device=batch.valid.device).expand_as(batch.valid)
    return labelled_positions(batch.valid)


@dataclass(frozen=True, slots=True)
class BlockLabels:
    """Labels of one block, selected rows only: where [R] flat places in the block's rows, row [R] their window's
    place in the batch; the rest [R, K, ...]."""

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
        return cls(where, row, ids.clamp(min=0), probs, usable.flatten()[flat] & inside, actual, actual_log_prob)


@dataclass(frozen=True, slots=True)
class _BlockTerms:
    draft: Tensor
    rank: Tensor
    top1: Tensor


def _block_terms(
    model: DraftNetwork, u: Tensor, labels: BlockLabels, bias_BV: Tensor | None, settings: LossSettings
) -> _BlockTerms:
    normed = model.norm(u.flatten(0, 1)[labels.where])  # [R, K, H]
    logits = model.lm_head(normed).float()
    if bias_BV is not None:
        logits = logits + bias_BV.float()[labels.row][:, None]
    log_q = torch.log_softmax(logits, dim=-1)
    cross_entropy = -(labels.probs * log_q.gather(-1, labels.ids)).sum(dim=-1)
    with torch.no_grad():
        best = labels.ids[..., 0]
        rank = 1 + (logits > logits.gather(-1, best[..., None])).sum(dim=-1)
        hit = rank == 1
        weight = slot_weights(log_q, hit, labels, settings.prefix)
        total = weight.sum(dim=0)
    draft = (weight * cross_entropy).sum(dim=0) / total.clamp(min=1e-6)
    top1 = (weight * hit).sum(dim=0) / total.clamp(min=1e-6)
    if not model.has_rank_head:
        return _BlockTerms(draft, draft.new_zeros(()), top1)
    return _BlockTerms(draft, _rank_loss(model, normed, logits.detach(), rank, labels.usable), top1)


def slot_weights(log_q: Tensor, hit: Tensor, labels: BlockLabels, prefix: str) -> Tensor:
    """How much each slot counts, float32 [R, K]: whether, or how likely, it is reached and labelled.

    Args:
        log_q: [R, K, Vd], the drafter's log-probabilities.
        hit: bool [R, K], it agrees with the target's arg-max.
        labels: of the rows.
        prefix: see ``LossSettings``.
    """
    if prefix == "argmax":
        step = hit.float()
    else:
        q = log_q.gather(-1, labels.actual.clamp(min=0)[..., None]).squeeze(-1)
        step = (q - labels.actual_log_prob).clamp(max=0).exp() * (labels.actual >= 0)
    step = step * labels.usable
    reached = torch.cumprod(torch.cat([torch.ones_like(step[:, :1]), step[:, :-1]], dim=1), dim=1)
    return reached * labels.usable


def _rank_loss(model: DraftNetwork, normed: Tensor, logits: Tensor, rank: Tensor, usable: Tensor) -> Tensor:
    """Method reference 6.4: frequency-weighted, under-estimation costs double, own valid-prefix chain."""
    top = torch.topk(logits, min(RANK_TOP, logits.shape[-1]), dim=-1).values
    top = F.pad(top, (0, RANK_TOP - top.shape[-1]), value=-1e4)
    rank_logits = model.rank_logits(normed, rank_features(top)).float()
    classes = torch.arange(rank_logits.shape[-1], device=logits.device)
    with torch.no_grad():
        true = rank_class(rank)
        predicted = rank_logits.argmax(dim=-1)
        right = (true == predicted).float()
        chain = torch.cumprod(torch.cat([torch.ones_like(right[:, :1]), right[:, :-1]], dim=1), dim=1)
        weight = chain * usable
        one_hot = F.one_hot(true, classes.shape[0]).float()
        count = (one_hot * weight[..., None]).sum(dim=0)
        frequency = (10 / count.clamp(min=1)).clamp(max=1)
        weight = weight * (one_hot * frequency).sum(dim=-1)
        distance = 1 + (true - predicted).abs() + (true - predicted).clamp(min=0)
        gap = true[..., None] - classes
        soft = 1 / (1 + gap.abs() + gap.clamp(min=0)).float() ** 2
        soft = soft / soft.sum(dim=-1, keepdim=True)
    cross_entropy = -(soft * torch.log_softmax(rank_logits, dim=-1)).sum(dim=-1)
    return (weight * distance * cross_entropy).sum() / weight.sum().clamp(min=1)

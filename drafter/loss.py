"""Multi-block training loss: valid-prefix-masked soft cross-entropy and the rank loss.

Legend: B batch, T positions, K slots, H hidden, k stored target log-probabilities, Vd draft vocabulary.
Source: method reference 6.2 - 6.5 and masks of 1.6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from specblock.drafter.head_loss import head_loss
from specblock.drafter.labels import BlockLabels, labelled_positions, later_positions
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
        self._cached, self._num_layers = cached, model.config.num_hidden_layers
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
        last = layer + 1 == self._num_layers  # where only wanted rows ask
        mask = self._wanted_mask if last and self._wanted_mask is not None else self._mask
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


def _wanted(model: DraftNetwork, batch: TrainingBatch, num_blocks: int) -> Tensor:
    """Positions [B, N] whose u the loss needs: labelled ones, and all where a later block looks at its other rows."""
    if num_blocks > 1 and model.config.published_mask:
        return torch.arange(batch.valid.shape[1], device=batch.valid.device).expand_as(batch.valid)
    return labelled_positions(batch.valid)


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
    bias_BV = None if bias_BV is None else bias_BV.float()
    decay = [settings.slot_decay**slot for slot in range(width)]
    draft, rank, top1 = batch.features.new_zeros((), dtype=torch.float32), [], []
    for number, u in enumerate(hidden):
        positions = wanted.gather(1, later) if number else wanted
        labels = BlockLabels.of(batch, draft_ids, usable, positions, sum(consumed[:number]), width)
        normed = model.norm(u.flatten(0, 1)[labels.where])  # [R, K, H]
        factors = [settings.block_decay**number * own for own in decay]
        top_count = min(RANK_TOP, model.config.draft_vocab_size) if model.has_rank_head else 0
        found = head_loss(normed, model.lm_head.weight, labels, bias_BV, factors, settings.prefix, top_count)
        draft = draft + found.loss
        top1.append(found.top1)
        if model.has_rank_head:
            rank.append(_rank_loss(model, normed, found.top, found.rank, labels.usable))
    rank_total = torch.stack(rank).sum() if rank else draft.new_zeros(())
    total = draft + settings.rank_weight * rank_total
    return LossReport(total, draft.detach(), rank_total.detach(), torch.stack(top1))


def _rank_loss(model: DraftNetwork, normed: Tensor, top: Tensor, rank: Tensor, usable: Tensor) -> Tensor:
    """Method reference 6.4: frequency-weighted, under-estimation costs double, own valid-prefix chain."""
    top = F.pad(top, (0, RANK_TOP - top.shape[-1]), value=-1e4)
    rank_logits = model.rank_logits(normed, rank_features(top)).float()
    classes = torch.arange(rank_logits.shape[-1], device=top.device)
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

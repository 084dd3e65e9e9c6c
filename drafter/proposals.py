"""What a network proposes at each slot: best tokens, their scores and how many of them to keep.

Legend: B requests, n leaves, K slots, W fan-out width, Vd draft vocabulary.
Source: method reference section 3; design 4.1 (shared noise).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specblock.cuda_ext.noise import NoiseRows
from specblock.cuda_ext.ranking import best_tokens
from specblock.cuda_ext.sampling import SamplingBatch
from specblock.drafter.config import DraftSettings
from specblock.drafter.model import RANK_TOP, rank_features
from specblock.drafter.network import DraftNetwork


@dataclass(frozen=True, slots=True)
class Proposals:
    """Per slot the best W tokens: token int64 [.., K, W] (target ids), log_prob [.., K, W], fan_out int64 [.., K]."""

    token: Tensor
    log_prob: Tensor
    fan_out: Tensor


def propose(
    network: DraftNetwork,
    settings: DraftSettings,
    hidden_BnKH: Tensor,
    noise: NoiseRows | None,
    sampling: SamplingBatch,
    first: bool,
) -> Proposals:
    """Best tokens, their log-probabilities and the fan-out of every slot.

    Args:
        network: the drafter's network.
        settings: fan-outs and noise.
        hidden_BnKH: u of the slots.
        noise: the target's noise at the slots' positions, B * n * K rows, or None to rank by log q alone.
        sampling: parameters of the B requests.
        first: these are slots of block 1.
    """
    normed = network.norm(hidden_BnKH)
    logits = network.lm_head(normed)
    vocab_size, num_leaves_slots = logits.shape[-1], logits.shape[1] * logits.shape[2]
    ranked = network.has_rank_head and settings.rank_head
    width = min(settings.beam if first or not ranked else max(settings.fan_out), vocab_size)
    best = best_tokens(
        logits.flatten(0, 2),
        noise,
        None if network.full_vocabulary else network.draft_ids,
        sampling.repeated(num_leaves_slots),
        settings.noise_scale,
        width,
        min(RANK_TOP, vocab_size),
    )
    token = best.index if network.full_vocabulary else network.draft_ids[best.index]
    log_prob = best.log_prob.view(*logits.shape[:-1], width)
    if ranked:
        # A draft vocabulary below 20 tokens pads the features; the classes then never reach past it.
        top = best.top.view(*logits.shape[:-1], -1)
        padded = torch.nn.functional.pad(top, (0, RANK_TOP - top.shape[-1]), value=-1e4)
        rank = network.rank_logits(normed, rank_features(padded)).argmax(dim=-1)
        fan_out = ranked_fan_out(settings, rank, log_prob[..., 0].exp(), first)
    else:
        fan_out = torch.full(log_prob.shape[:-1], width, device=log_prob.device)
    return Proposals(token.view_as(log_prob), log_prob, fan_out)


def ranked_fan_out(settings: DraftSettings, rank_BnK: Tensor, greedy_p_BnK: Tensor, first: bool) -> Tensor:
    """Tokens kept per slot, the greedy one included; 0 from the first slot that gives up onward."""
    table = torch.tensor(settings.fan_out, device=rank_BnK.device)
    fan_out = table[rank_BnK]
    open_slots = fan_out > 0
    for limit, cap in reversed(settings.other_caps):
        fan_out = torch.where(greedy_p_BnK >= limit, fan_out.clamp(max=cap), fan_out)
    if first:
        slot_0 = torch.full_like(fan_out[..., 0], settings.beam)
        for limit, cap in reversed(settings.first_caps):
            slot_0 = torch.where(greedy_p_BnK[..., 0] >= limit, min(cap, settings.beam), slot_0)
        fan_out = torch.cat([slot_0[..., None], fan_out[..., 1:]], dim=-1)
        open_slots = torch.cat([torch.ones_like(open_slots[..., :1]), open_slots[..., 1:]], dim=-1)
    return fan_out * torch.cumprod(open_slots.to(fan_out.dtype), dim=-1)

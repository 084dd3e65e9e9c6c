"""What a network proposes at each slot: best tokens, their scores and how many of them to keep.

Legend: B requests, n leaves, K slots, W fan-out width, Vd draft vocabulary.
Source: method reference section 3; design 4.1 (shared noise).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
    gumbel: Tensor | None,
    sampling: SamplingBatch,
    first: bool,
) -> Proposals:
    """Best tokens, their log-probabilities and the fan-out of every slot.

    Args:
        network: the drafter's network.
        settings: fan-outs and noise.
        hidden_BnKH: u of the slots.
        gumbel: the target's noise [B, n, K, V] at the slots' positions, or None to rank by log q alone.
        sampling: parameters of the B requests.
        first: these are slots of block 1.
    """
    normed = network.norm(hidden_BnKH)
    logits = network.lm_head(normed).to(torch.float32)
    top = torch.topk(logits, min(RANK_TOP, logits.shape[-1]), dim=-1).values
    ranked = network.has_rank_head and settings.rank_head
    width = settings.beam if first or not ranked else max(settings.fan_out)
    width = min(width, logits.shape[-1])
    if gumbel is None:
        best = torch.topk(logits, width, dim=-1)
        log_prob = best.values - torch.logsumexp(logits, dim=-1, keepdim=True)
    else:
        if not network.full_vocabulary:
            gumbel = gumbel[..., network.draft_ids]
        score = perturbed(logits, top, gumbel.to(torch.float32), sampling, settings.noise_scale)
        best = torch.topk(score, width, dim=-1)
        log_prob = best.values - torch.logsumexp(score, dim=-1, keepdim=True)
    if ranked:
        # A draft vocabulary below 20 tokens pads the features; the classes then never reach past it.
        padded = torch.nn.functional.pad(top, (0, RANK_TOP - top.shape[-1]), value=-1e4)
        rank = network.rank_logits(normed, rank_features(padded)).argmax(dim=-1)
        fan_out = ranked_fan_out(settings, rank, log_prob[..., 0].exp(), first)
    else:
        fan_out = torch.full(log_prob.shape[:-1], width, device=log_prob.device)
    return Proposals(network.draft_ids[best.indices], log_prob, fan_out)


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


def perturbed(logits: Tensor, top: Tensor, gumbel: Tensor, sampling: SamplingBatch, scale: float) -> Tensor:
    """Draft logits ranked with the target's own noise: ``(log q / T + Gumbel) / scale`` for sampled rows.

    The target will choose arg-max(log p + Gumbel); with the noise known, what is uncertain is only how far q is from
    p. ``scale`` is that distance in nats, so the result reads as the drafter's log-odds of the target's choice.
    Tokens that the request's top-k, min-p or top-p surely remove are dropped (top-p only where the 20 best decide it).

    Args:
        logits: float32 [B, n, K, Vd].
        top: float32 [B, n, K, 20], the largest of them, descending.
        gumbel: float32 [B, n, K, Vd].
        sampling: parameters of the B requests.
        scale: nats.

    Returns:
        float32 [B, n, K, Vd]; greedy rows are the logits themselves.
    """
    greedy = (sampling.temperature == 0).view(-1, 1, 1, 1)
    temperature = sampling.temperature.to(torch.float32).view(-1, 1, 1, 1)
    temperature = torch.where(greedy, 1.0, temperature)
    scaled, scaled_top = logits / temperature, top / temperature
    normaliser = torch.logsumexp(scaled, dim=-1, keepdim=True)
    before = torch.cumsum((scaled_top - normaliser).exp(), dim=-1) - (scaled_top - normaliser).exp()
    kept = before < sampling.top_p.to(torch.float32).view(-1, 1, 1, 1)
    floor = torch.where(kept, scaled_top, torch.inf).amin(dim=-1, keepdim=True)
    floor = torch.where(kept.all(dim=-1, keepdim=True), -torch.inf, floor)
    floor = torch.maximum(floor, scaled_top[..., :1] + sampling.min_p.to(torch.float32).view(-1, 1, 1, 1).log())
    top_k = sampling.top_k.view(-1, 1, 1, 1).expand(*top.shape[:-1], 1)
    by_rank = scaled_top.gather(-1, top_k.clamp(1, top.shape[-1]) - 1)
    floor = torch.where((top_k > 0) & (top_k <= top.shape[-1]), torch.maximum(floor, by_rank), floor)
    score = ((scaled + gumbel) / scale).masked_fill(scaled < floor, -torch.inf)
    return torch.where(greedy, logits, score)

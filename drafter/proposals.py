"""What a network proposes at each slot: best tokens, their scores and how many of them to keep.

Legend: B requests, n leaves, K slots, W fan-out width, Vd draft vocabulary.
Source: method reference section 3; design 4.1 (shared noise).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specblock.cuda_ext.draft_rows import HeadWeights, draft_head, draft_head_reference
from specblock.cuda_ext.noise import NoiseRows
from specblock.cuda_ext.pair_gains import PairStrength, follow_chain
from specblock.cuda_ext.ranking import BestTokens
from specblock.cuda_ext.sampling import SamplingBatch
from specblock.drafter.config import DraftSettings
from specblock.drafter.fan_out import FanOutRule
from specblock.drafter.model import RANK_TOP, rank_features
from specblock.drafter.network import DraftNetwork


@dataclass(frozen=True, slots=True)
class Proposals:
    """Per slot the best W tokens: token int64 [.., K, W] (target ids), log_prob [.., K, W], fan_out int64 [.., K]."""

    token: Tensor
    log_prob: Tensor
    fan_out: Tensor


@dataclass(frozen=True, slots=True)
class Ranking:
    """How proposals of B requests are ranked.

    Attributes:
        noise: the target's noise at the slots' positions, B * n * K rows, or None to rank by log q alone.
        sampling: parameters of the B requests.
        bias_rows: int64 [B], ``TokenBias.rows`` of the requests' domains; None where there is nothing to add.
    """

    noise: NoiseRows | None
    sampling: SamplingBatch
    bias_rows: Tensor | None


def propose(
    network: DraftNetwork,
    settings: DraftSettings,
    rule: FanOutRule,
    hidden_BnKH: Tensor,
    ranking: Ranking,
    first: bool,
) -> Proposals:
    """Best tokens, their log-probabilities and the fan-out of every slot.

    Args:
        network: the drafter's network.
        settings: widths and noise.
        rule: fan-outs where the rank head decides.
        hidden_BnKH: u of the slots.
        ranking: how they are ranked.
        first: these are slots of block 1.
    """
    vocab_size, shape = network.config.draft_vocab_size, hidden_BnKH.shape[:-1]
    ranked = network.has_rank_head and settings.rank_head
    width = min(settings.beam if first or not ranked else max(settings.fan_out), vocab_size)
    normed, best = _of_head(network, hidden_BnKH.flatten(0, 2), ranking, settings.noise_scale, width)
    token = best.index if network.full_vocabulary else network.draft_ids[best.index]
    log_prob = best.log_prob.view(*shape, width)
    if ranked:
        # A draft vocabulary below 20 tokens pads the features; the classes then never reach past it.
        top = best.top.view(*shape, -1)
        padded = torch.nn.functional.pad(top, (0, RANK_TOP - top.shape[-1]), value=-1e4)
        rank = network.rank_logits(normed.view(*shape, -1), rank_features(padded)).argmax(dim=-1)
        fan_out = rule.fan_out(rank, log_prob[..., 0].exp(), first)
    else:
        fan_out = torch.full(log_prob.shape[:-1], width, device=log_prob.device)
    token = token.view_as(log_prob)
    pairs = network.token_pairs
    # On a GPU a recorded graph must hold it: it does not see that pairs were counted since.
    if settings.pair_weight > 0 and network.has_chains and (pairs.used or token.is_cuda):
        strength = PairStrength(settings.pair_weight, ranking.noise is not None, settings.noise_scale)
        token, log_prob = follow_chain(token, log_prob, ranking.sampling.temperature, pairs.known, strength)
    return Proposals(token, log_prob, fan_out)


def _of_head(
    network: DraftNetwork, hidden_NH: Tensor, ranking: Ranking, scale: float, width: int
) -> tuple[Tensor, BestTokens]:
    """Rows [N, H] after the final norm, and the best ``width`` tokens of the head's logits."""
    vocab_size, bias_rows = network.config.draft_vocab_size, ranking.bias_rows
    ids, wanted = None if network.full_vocabulary else network.draft_ids, (width, min(RANK_TOP, vocab_size))
    packed, table = network.lm_head.packed_weight(), network.token_bias.table
    weights = HeadWeights(norm=network.norm.weight, eps=network.norm.eps, head=packed or network.lm_head, bias=table)
    call = draft_head if packed else draft_head_reference
    return call(hidden_NH, weights, bias_rows, ranking.noise, ids, ranking.sampling, scale, *wanted)

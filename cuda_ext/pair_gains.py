"""Candidates of a chain's slots, ranked by what the token before them says.

The slots of a block are predicted side by side: a slot knows the *law* of the token before it, but not which one the
chain took. How much likelier one token is behind another than anywhere is known from counting pairs; added to the
slot's scores, it makes a chain hang together.

Legend: B requests, n leaves, K slots, W candidates of a slot, V vocabulary, N pairs.
Source: Kim et al., Exploring and Improving Drafts in Blockwise Parallel Decoding (2024), who rank drafts by n-grams.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specblock.cuda_ext.native import has_kernel

_CUDA_CANDIDATES = 64  # the most of a slot that the CUDA kernel ranks
_LEAST = 1e-6
"""Share of a slot's law that is outside of its candidates at least."""


@dataclass(frozen=True, slots=True)
class PairGains:
    """Log-likelihood ratios ``log p(token | before) / p(token)``.

    Attributes:
        starts: int32 [V + 1], where the followers of each token begin, ascending; the last is how many there are.
        tokens: int32 [N], followers, ascending for each token; what is behind the last one is not read.
        gains: float32 [N], of these pairs.
        rest: float32 [V], of everything else behind a token.
        keys: int64 [N], ``before * V + token``, ascending; ``V * V`` behind the last one.
    """

    starts: Tensor
    tokens: Tensor
    gains: Tensor
    rest: Tensor
    keys: Tensor

    def of(self, before: Tensor, token: Tensor) -> Tensor:
        """float32 gains of pairs of int64 tokens of one shape."""
        key = before * self.rest.shape[0] + token
        place = torch.searchsorted(self.keys, key).clamp(max=self.keys.shape[0] - 1)
        return torch.where(self.keys[place] == key, self.gains[place], self.rest[before])


@dataclass(frozen=True, slots=True)
class PairStrength:
    """How much gains count: ``weight`` of a logit.

    noisy: proposals of sampled requests are ranked as ``(log q / T + Gumbel) / scale``, and gains go with ``log q``.
    """

    weight: float
    noisy: bool
    scale: float

    def of(self, temperature_B: Tensor) -> Tensor:
        """float32 [B]."""
        sampled = self.noisy & (temperature_B > 0)
        by_noise = self.weight / (self.scale * torch.where(sampled, temperature_B, 1.0))
        return torch.where(sampled, by_noise, self.weight).to(torch.float32)


def follow_chain(
    token: Tensor, log_prob: Tensor, temperature: Tensor, known: PairGains, strength: PairStrength
) -> tuple[Tensor, Tensor]:
    """Ranks the candidates of every slot but the first by the best candidate of the slot before it.

    Args:
        token: int64 [B, n, K, W], target ids, best first.
        log_prob: float32 alike.
        temperature: float64 [B].
        known: pairs of the target's vocabulary.
        strength: of their gains.

    Returns:
        token and log_prob, best first. A slot's candidates share what they have of its law and what the rest keeps.
    """
    if (token.is_cpu or token.shape[3] <= _CUDA_CANDIDATES) and has_kernel("follow_chain", token):
        pairs = (known.starts, known.tokens, known.gains, known.rest)
        how = (strength.noisy, strength.weight, strength.scale)
        found: tuple[Tensor, Tensor] = torch.ops.specblock.follow_chain(
            token.contiguous(), log_prob.contiguous(), temperature, *pairs, *how
        )
        return found
    return follow_chain_reference(token, log_prob, temperature, known, strength)


def follow_chain_reference(
    token: Tensor, log_prob: Tensor, temperature: Tensor, known: PairGains, strength: PairStrength
) -> tuple[Tensor, Tensor]:
    """``follow_chain`` on any device."""
    counts = strength.of(temperature)[:, None, None]
    tokens, scores = [token[:, :, 0]], [log_prob[:, :, 0]]
    for slot in range(1, token.shape[2]):
        before, own, old = tokens[-1][..., :1], token[:, :, slot], log_prob[:, :, slot]
        new = old + counts * known.of(before.expand_as(own), own)
        outside = (1 - old.exp().sum(dim=-1, keepdim=True)).clamp(min=_LEAST).log()
        # At low temperatures scores are far from 0 on either side.
        normaliser = torch.logsumexp(torch.cat([new, outside], dim=-1), dim=-1, keepdim=True)
        new, order = torch.sort(new - normaliser, dim=-1, descending=True, stable=True)
        alive = torch.isfinite(scores[-1][..., :1]) & torch.isfinite(normaliser)
        tokens.append(torch.where(alive, own.gather(-1, order), own))
        scores.append(torch.where(alive, new, old))
    return torch.stack(tokens, dim=2), torch.stack(scores, dim=2)

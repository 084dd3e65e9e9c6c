"""Sampling parameters and the processed target distribution they define.

They live here because both sides need them: the verifier to choose, the drafter to rank its proposals by the
distribution that will be chosen from. Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specblock.cuda_ext.transfer import on_device

_PREFIX_TOKENS = 1024  # a nucleus that needs more than this is found by a full sort


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen. Values follow the OpenAI and vLLM conventions.

    Attributes:
        temperature: 0 is plain arg-max (lowest token id on ties).
        top_p: nucleus mass, in (0, 1].
        top_k: number of most probable tokens kept; 0 keeps all.
        min_p: tokens below ``min_p`` times the largest probability are dropped, in [0, 1].
        repetition_penalty: in [0.01, 100]; divides positive and multiplies negative logits of every seen token,
            prompt included.
        presence_penalty: subtracted once from the logit of every *generated* token, in [-2, 2].
        frequency_penalty: subtracted once per occurrence among *generated* tokens, in [-2, 2].
        logit_bias: (token id, bias) pairs added to the logits; kept as pairs so that the object stays hashable.
        seed: 64-bit seed of the Gumbel noise.
        choice: index of the parallel completion.

    Raises:
        ValueError: a value is out of range; the message starts with the parameter's name.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = field(default=())
    seed: int = 0
    choice: int = 0

    def __post_init__(self) -> None:
        checks: Mapping[str, bool] = {
            "temperature: must be a finite number >= 0": math.isfinite(self.temperature) and self.temperature >= 0,
            "top_p: must be in (0, 1]": 0 < self.top_p <= 1,
            # Both travel as int64: a larger one would fail inside a batch, and the batch with it.
            "top_k: must be an integer from 0 (keeps every token) to 2**63 - 1": 0 <= self.top_k < 2**63,
            "min_p: must be in [0, 1]": 0 <= self.min_p <= 1,
            "repetition_penalty: must be in [0.01, 100]": 0.01 <= self.repetition_penalty <= 100,
            "presence_penalty: must be in [-2, 2]": -2 <= self.presence_penalty <= 2,
            "frequency_penalty: must be in [-2, 2]": -2 <= self.frequency_penalty <= 2,
            "logit_bias: token ids must be >= 0 and biases finite": all(
                token >= 0 and math.isfinite(bias) for token, bias in self.logit_bias
            ),
            "seed: must be an integer from -2**63 to 2**63 - 1": -(2**63) <= self.seed < 2**63,
            "choice: must be in [0, 2**32)": 0 <= self.choice < 2**32,
        }
        for message, holds in checks.items():
            if not holds:
                raise ValueError(message)

    @property
    def needs_history(self) -> bool:
        """True when the distribution depends on which tokens came before (penalties)."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Sampling parameters of N rows: temperature, top_p, min_p float64 [N]; top_k, seed, choice int64 [N]."""

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor
    seed: Tensor
    choice: Tensor

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> SamplingBatch:
        """Stacks the parameters of several requests."""

        reals = [[getattr(p, name) for p in params] for name in ("temperature", "top_p", "min_p")]
        whole = [[getattr(p, name) for p in params] for name in ("top_k", "seed", "choice")]
        temperature, top_p, min_p = on_device(reals, device, torch.float64)
        top_k, seed, choice = on_device(whole, device, torch.int64)
        return cls(temperature, top_p, top_k, min_p, seed, choice)

    def rows(self, index: Tensor) -> SamplingBatch:
        """The batch for rows ``index`` (int64 [M], repeats allowed)."""
        return SamplingBatch(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    @property
    def law(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What shapes the distribution, in the order of the native operations: temperature, top_p, top_k, min_p."""
        return self.temperature, self.top_p, self.top_k, self.min_p

    def repeated(self, times: int) -> SamplingBatch:
        """Every row ``times`` times in a row: N * times rows."""
        if times == 1:
            return self
        return SamplingBatch(*(getattr(self, name).repeat_interleave(times) for name in self.__dataclass_fields__))


def processed_log_probs(logits_NV: Tensor, sampling: SamplingBatch) -> Tensor:
    """Log-probabilities after temperature, top-k, top-p and min-p, in that order.

    The filters keep the set that transformers' logits warpers keep: top-p keeps the smallest set of most probable
    tokens whose mass reaches ``top_p``. Rows with temperature 0 become a point mass on the arg-max (lowest id on ties).
    Tokens of equal probability are ordered by id, so the kept set is the same in any batch.

    Args:
        logits_NV: [N, V], any float type, penalties and biases already applied.
        sampling: parameters of the N rows.

    Returns:
        float64 [N, V]; -inf for removed tokens; each row sums to one in probability.
    """
    vocab_size = logits_NV.shape[-1]
    greedy_N = sampling.temperature == 0
    scaled_NV = logits_NV.to(torch.float64) / torch.where(greedy_N, 1.0, sampling.temperature)[:, None]
    top_k_N = torch.where(sampling.top_k < vocab_size, sampling.top_k, 0)
    filters = _Filters(torch.where(greedy_N, 1, top_k_N), sampling.top_p, sampling.min_p)
    filtered_N = filters.active
    if bool(filtered_N.any()):
        keep_NV, settled_N = _kept(scaled_NV, filters, min(vocab_size, _PREFIX_TOKENS))
        keep_NV |= ~filtered_N[:, None]
        # Each row takes the short or the long way by itself alone, so its result is the same in any batch.
        wide = (filtered_N & ~settled_N).nonzero().flatten()
        if wide.numel():
            keep_NV[wide] = _kept(scaled_NV[wide], filters.rows(wide), vocab_size)[0]
        scaled_NV = scaled_NV.masked_fill(~keep_NV, -torch.inf)
    return torch.log_softmax(scaled_NV, dim=-1)


@dataclass(frozen=True, slots=True)
class _Filters:
    """top_k int64 [N] (0: off), top_p and min_p float64 [N]."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    @property
    def active(self) -> Tensor:
        """bool [N]: rows from which something may be removed."""
        return (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)

    def rows(self, index: Tensor) -> _Filters:
        return _Filters(self.top_k[index], self.top_p[index], self.min_p[index])


def _kept(scaled_NV: Tensor, filters: _Filters, width: int) -> tuple[Tensor, Tensor]:
    """The tokens that survive the filters, from the ``width`` largest values of each row.

    A nucleus is small against the vocabulary: finding its edge among the largest values costs a tenth of a full sort.

    Returns:
        bool [N, V] kept tokens, and bool [N]: False where the edge lies beyond ``width`` and the mask is meaningless.
    """
    values_NW = torch.topk(scaled_NV, width, dim=-1).values
    rank_W = torch.arange(width, device=scaled_NV.device)
    top_k_N1, top_p_N1, min_p_N1 = filters.top_k[:, None], filters.top_p[:, None], filters.min_p[:, None]
    keep_NW = (top_k_N1 == 0) | (rank_W < top_k_N1)
    # top-p and min-p act on what top-k left, renormalised.
    within_N = torch.logsumexp(values_NW.masked_fill(~keep_NW, -torch.inf), dim=-1)
    total_N = torch.where(filters.top_k == 0, torch.logsumexp(scaled_NV, dim=-1), within_N)
    probs_NW = torch.exp(values_NW - total_N[:, None])
    before_NW = torch.cumsum(probs_NW, dim=-1) - probs_NW
    keep_NW &= (before_NW < top_p_N1) | (top_p_N1 >= 1)
    keep_NW &= probs_NW >= min_p_N1 * probs_NW[:, :1]
    keep_NW[:, 0] = True
    # The kept set is every value above the edge and, of those equal to it, as many as fit, lowest ids first.
    edge_N1 = values_NW.gather(1, keep_NW.sum(dim=-1, keepdim=True) - 1)
    room_N1 = (keep_NW & (values_NW == edge_N1)).sum(dim=-1, keepdim=True)
    equal_NV = scaled_NV == edge_N1
    keep_NV = (scaled_NV > edge_N1) | (equal_NV & (torch.cumsum(equal_NV, dim=-1) <= room_N1))
    inside_N = ~keep_NW[:, -1] & (filters.top_k <= width)  # a larger top-k would be renormalised over too little
    return keep_NV, inside_N | (width == scaled_NV.shape[-1])

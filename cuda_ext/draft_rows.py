"""What a drafter's network does around its layers, for the few rows of a cycle: one native call before, one behind.

Legend: B requests, P positions, K slots, H hidden, F fused features, V and Vd target and draft vocabulary, N rows,
W tokens wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from specblock.cuda_ext.linear import PackedWeight
from specblock.cuda_ext.noise import NoiseRows
from specblock.cuda_ext.norm import rms_norm
from specblock.cuda_ext.ranking import BestTokens, best_tokens
from specblock.cuda_ext.sampling import SamplingBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotInputWeights:
    """What rows are made of; products are coarse all together or not at all.

    Attributes:
        condition_norm: [H], of conditions, and its eps, which the token's norm shares.
        condition_part: product of normalised conditions.
        token_norm: [H].
        token_part: product of normalised embeddings.
        slots: float32 [K, H], what each slot adds.
    """

    condition_norm: Tensor
    condition_part: PackedWeight
    token_norm: Tensor
    token_part: PackedWeight
    eps: float
    slots: Tensor


def slot_inputs(
    x: Tensor, token: Tensor, embedding: Tensor, weights: SlotInputWeights, projection: PackedWeight | None
) -> Tensor:
    """Rows of a block: ``condition_part(norm(condition)) + token_part(norm(embedding[token])) + slots``.

    Args:
        x: float32 [B, P, F] on the CPU, projected to conditions; without a projection [B, P, H], conditions.
        token: int64 [B, P].
        embedding: float32 [V, H].
        weights: packed.
        projection: of features.

    Returns:
        float32 [B, P, K, H].
    """
    w = weights
    assert projection is None or projection.coarse == w.token_part.coarse, "mixed products"
    result: Tensor = torch.ops.specblock.slot_inputs.default(
        x.contiguous(), None if projection is None else projection.panels, w.condition_norm, w.condition_part.panels,
        token.contiguous(), embedding, w.token_norm, w.token_part.panels, w.eps, w.slots, w.token_part.coarse,
    )  # fmt: skip
    return result


def slot_inputs_reference(
    x: Tensor, token: Tensor, embedding: Tensor, weights: SlotInputWeights, projection: PackedWeight | None
) -> Tensor:
    """``slot_inputs`` of its parts."""
    w, condition = weights, x if projection is None else projection(x)
    shared = w.condition_part(rms_norm(condition, w.condition_norm, w.eps))
    shared = shared + w.token_part(rms_norm(F.embedding(token, embedding), w.token_norm, w.eps))
    return shared[..., None, :] + w.slots


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadWeights:
    """The final norm [H], its eps, the draft head, and what is added to its logits: ``bias`` [X, Vd] or nothing.

    A head that is not packed serves ``draft_head_reference`` only.
    """

    norm: Tensor
    eps: float
    head: PackedWeight | Callable[[Tensor], Tensor]
    bias: Tensor | None = None


def draft_head(
    hidden: Tensor,
    weights: HeadWeights,
    bias_rows: Tensor | None,
    noise: NoiseRows | None,
    ids: Tensor | None,
    sampling: SamplingBatch,
    scale: float,
    width: int,
    num_top: int,
) -> tuple[Tensor, BestTokens]:
    """Rows normalised, and the best tokens of the head's logits; one native call.

    Args:
        hidden: float32 [N, H] on the CPU, rows of one request after the other, as many of each.
        weights: packed; ``bias`` where there are ``bias_rows``.
        bias_rows: int64 [B], the row of the bias that each request's logits get; None adds nothing.
        noise: as of ``best_tokens``, and so are the others.
        ids: int64 [Vd].
        sampling: of the B requests.
        scale: nats.
        width: W.
        num_top: of the largest logits.

    Returns:
        float32 [N, H], and what ``best_tokens`` returns.
    """
    w, head = weights, weights.head
    assert isinstance(head, PackedWeight), "only packed heads are native"
    normed, *best = torch.ops.specblock.draft_head.default(
        hidden.contiguous(), w.norm, w.eps, head.panels, head.out_features, None if bias_rows is None else w.bias,
        bias_rows, noise.storage if noise else None, noise.index if noise else None, ids if noise else None,
        *sampling.law, scale, width, num_top, head.coarse,
    )  # fmt: skip
    return normed, BestTokens(*best)


def draft_head_reference(
    hidden: Tensor,
    weights: HeadWeights,
    bias_rows: Tensor | None,
    noise: NoiseRows | None,
    ids: Tensor | None,
    sampling: SamplingBatch,
    scale: float,
    width: int,
    num_top: int,
) -> tuple[Tensor, BestTokens]:
    """``draft_head`` of its parts, for any device and float type."""
    normed = rms_norm(hidden, weights.norm, weights.eps)
    logits = weights.head(normed)
    if bias_rows is not None:
        assert weights.bias is not None, "rows of a bias that is not there"
        bias_NV = weights.bias[bias_rows].repeat_interleave(len(logits) // len(bias_rows), dim=0)
        logits = logits.float() + bias_NV.float()  # bfloat16 would lose small ones
    return normed, best_tokens(logits, noise, ids, sampling, scale, width, num_top)

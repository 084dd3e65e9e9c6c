"""The target's choice: arg-max of processed log-probability plus Gumbel noise.

Legend: N rows, V vocabulary. Source: design section 4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specblock.cuda_ext.native import has_kernel
from specblock.cuda_ext.noise import NoiseRows
from specblock.cuda_ext.sampling import SamplingBatch, processed_log_probs


def choose(logits_NV: Tensor, sampling: SamplingBatch, noise: NoiseRows) -> Tensor:
    """The chosen token of every row.

    Args:
        logits_NV: [N, V], any float type, penalties and biases already applied.
        sampling: parameters of the N rows; temperature 0 is the arg-max, the lowest id of equals.
        noise: float64 Gumbel noise of the N rows.

    Returns:
        int64 [N].
    """
    if has_kernel("choose", logits_NV):
        # Widening is exact. A type of its own would make rows depend on whether a neighbour's penalties widened them.
        # The CUDA kernel reads every type and computes with all of them alike.
        wide = logits_NV if logits_NV.dtype == torch.float64 or logits_NV.is_cuda else logits_NV.float()
        chosen: Tensor = torch.ops.specblock.choose(wide.contiguous(), noise.storage, noise.index, *sampling.law)
        return chosen
    return choose_reference(logits_NV, sampling, noise)


def choose_reference(logits_NV: Tensor, sampling: SamplingBatch, noise: NoiseRows) -> Tensor:
    """The readable definition of ``choose``, for any device and float type."""
    return processed_log_probs(logits_NV, sampling).add_(noise.rows()).argmax(dim=-1)

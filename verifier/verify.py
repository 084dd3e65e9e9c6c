"""One verification: target forward over the trees, lossless acceptance, feedback for training.

Plain decoding is the same call with ``specblock.cuda_ext.tree.root_only``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specblock.cuda_ext.noise import NoiseWindow
from specblock.cuda_ext.ops import ancestor_mask
from specblock.cuda_ext.sampling import SamplingBatch
from specblock.cuda_ext.tree import DraftTree
from specblock.verifier.accept import accept
from specblock.verifier.history import ChoiceState
from specblock.verifier.kv_cache import TargetCache, host_list
from specblock.verifier.model import TargetModel
from specblock.verifier.result import VerifyResult, topk_log_probs


@torch.no_grad()
def verify(
    model: TargetModel,
    cache: TargetCache,
    slots: Sequence[int] | Tensor,
    tree: DraftTree,
    tree_depth: int,
    *,
    states: Sequence[ChoiceState],
    sampling: SamplingBatch,
    noise: NoiseWindow,
    top_k: int = 32,
) -> VerifyResult:
    """Verifies one tree per request.

    The caller decides how much of each path to keep (see ``finish``), then calls
    ``cache.commit(slots, result.rows, counts)`` and ``states[b].append(kept tokens)``: ``counts[b]`` tokens kept means
    as many rows committed, because the rows are the root and the accepted drafts *before* the last token.

    Args:
        model: the target.
        cache: its cache; slot ``s`` holds everything before the root of its tree.
        slots: [B] slots (host values preferred).
        tree: B trees; the root is the last chosen token, not yet in the cache.
        tree_depth: upper bound of the trees' depth.
        states: parameters and history per request; not changed.
        sampling: the same parameters as tensors on the model's device.
        noise: Gumbel window with at least ``tree_depth + 1`` positions, same slots as the cache.
        top_k: tokens per position in the feedback.
    """
    if noise.width <= tree_depth:
        raise ValueError(f"a noise window of {noise.width} positions is too narrow for trees of depth {tree_depth}")
    slot_list = host_list(slots)
    output = model.forward(
        cache, slot_list, tree.token, tree_mask=ancestor_mask(tree, tree_depth), depth=tree.depth, num_rows=tree.size
    )
    first_position = [cache.lengths[slot] + 1 for slot in slot_list]
    accepted = accept(output.logits, tree, states, sampling, noise, slot_list, first_position)
    request_B1 = torch.arange(len(slot_list), device=output.logits.device)[:, None]
    return VerifyResult(
        paths=accepted.paths,
        tokens=accepted.tokens,
        num_accepted=accepted.num_accepted,
        rows=accepted.rows,
        features=output.features[request_B1, accepted.rows],
        top=topk_log_probs(output.logits[request_B1, accepted.rows], top_k),
    )

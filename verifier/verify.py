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
    max_depth: int,
    states: Sequence[ChoiceState],
    noise: NoiseWindow,
    top_k: int = 32,
    *,
    sampling: SamplingBatch | None = None,
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
        max_depth: upper bound of the trees' depth.
        states: parameters and history per request; not changed.
        noise: Gumbel window with at least ``max_depth + 1`` positions, same slots as the cache. It is advanced to the
            choices of this cycle, unless a drafter that shares the noise has already done so.
        top_k: tokens per position in the feedback.
        sampling: the parameters as tensors on the model's device, if the caller has them already.
    """
    if noise.width <= max_depth:
        raise ValueError(f"a noise window of {noise.width} positions is too narrow for trees of depth {max_depth}")
    slot_list = host_list(slots)
    output = model.forward(cache, slot_list, tree.token, tree_mask=ancestor_mask(tree, max_depth), depth=tree.depth)
    first_position = [cache.lengths[slot] + 1 for slot in slot_list]
    _advance_noise(noise, states, slot_list, first_position, max_depth + 1)
    accepted = accept(output.logits, tree, states, noise, slot_list, first_position, sampling)
    request_B1 = torch.arange(len(slot_list), device=output.logits.device)[:, None]
    return VerifyResult(
        paths=accepted.paths,
        tokens=accepted.tokens,
        num_accepted=accepted.num_accepted,
        rows=accepted.rows,
        features=output.features[request_B1, accepted.rows],
        top=topk_log_probs(output.logits[request_B1, accepted.rows], top_k),
    )


def _advance_noise(
    noise: NoiseWindow, states: Sequence[ChoiceState], slots: Sequence[int], first_position: Sequence[int], count: int
) -> None:
    drawn = [b for b, state in enumerate(states) if state.params.temperature > 0]
    params = [states[b].params for b in drawn]
    noise.advance(
        [slots[b] for b in drawn],
        [first_position[b] for b in drawn],
        [p.seed for p in params],
        [p.choice for p in params],
        count,
    )

"""The refresh of the published code, for comparisons: which token goes with which feature, and at which index.

Training pairs ``h_i`` with ``x_{i+1}``; the published decoding does not. Source: method reference 9.1-9.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from specblock.drafter.interface import NewPositions
    from specblock.drafter.kv_cache import DrafterCache


def published_positions(cache: DrafterCache, slots: list[int], new: NewPositions) -> NewPositions:
    """What the published code would refresh a cycle with; moves the cache's row and rotary counters as it does.

    After the prompt the last pair is stored twice. After ``a >= 1`` accepted drafts every pair but the last carries
    the token after the one that follows its feature, and the rotary counter gains one too many. After none, the last
    position is overwritten and the counter stands still.

    Args:
        cache: its counters are changed so that ``refresh`` writes where the published code writes.
        slots: slot of each request.
        new: the correct pairs.
    """
    batch, width = new.tokens.shape
    tokens = torch.nn.functional.pad(new.tokens, (0, 1))
    features = torch.nn.functional.pad(new.features, (0, 0, 0, 1))
    counts = list(new.counts)
    for b, slot in enumerate(slots):
        count = counts[b]
        if count == 0:
            continue
        if not cache.drafted[slot]:
            tokens[b, count], features[b, count] = tokens[b, count - 1].clone(), features[b, count - 1].clone()
            counts[b] = count + 1
            cache.surplus[slot] = (1, 0)
        elif count == 1:
            cache.rows[slot] -= 1
            cache.surplus[slot] = (0, -1)
        else:
            tokens[b, : count - 1] = tokens[b, 1:count].clone()
            cache.surplus[slot] = (0, 1)
        cache.drafted[slot] = True
    assert features.shape == (batch, width + 1, new.features.shape[2])
    return type(new)(features, tokens, counts)

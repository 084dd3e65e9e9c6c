"""The planted fault of the demo is there in every forward of a drafter, whichever way it runs."""

from __future__ import annotations

import pytest
import torch

from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams
from specblock.daemon.demo_fault import DesynchronisedDrafter
from specblock.drafter.config import DraftSettings
from specblock.drafter.draft import BlockDrafter
from specblock.drafter.interface import NewPositions
from tests.drafter.helpers import HIDDEN, VOCAB, tiny_model


@pytest.mark.parametrize("head_dim", [8, 16])  # with masks, and in whole native layers where there are any
def test_a_desynchronised_drafter_drafts_something_else_in_every_cycle(head_dim: int) -> None:
    healthy = BlockDrafter(tiny_model(head_dim=head_dim), DraftSettings(node_budget=12, blocks=1))
    broken = DesynchronisedDrafter(healthy.model, healthy.settings)
    caches = [healthy.new_cache(1, 40), broken.new_cache(1, 40)]
    generator = torch.Generator().manual_seed(0)
    sampling = SamplingBatch.of([SamplingParams(temperature=0)])
    for count in (3, 2, 4, 1, 20, 1):
        features = torch.randn(1, count, 3 * HIDDEN, generator=generator)
        tokens = torch.randint(0, VOCAB, (1, count), generator=generator)
        new = NewPositions(features, tokens, [count])
        trees = [
            drafter.draft(cache, [0], new, tokens[:, -1], sampling, None).tree
            for drafter, cache in zip((healthy, broken), caches, strict=True)
        ]
        assert not torch.equal(trees[0].score, trees[1].score)

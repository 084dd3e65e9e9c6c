"""Acceptance as the engine calls it, on every device: the paths of the definition on the CPU."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch

from specblock.cuda_ext.noise import NoiseWindow
from specblock.cuda_ext.ops import grow_tree
from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams
from specblock.cuda_ext.tree import DraftTree
from specblock.verifier.accept import Acceptance, accept, accept_reference
from specblock.verifier.history import ChoiceState
from tests.random_trees import random_candidates

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
VOCABULARY, BUDGET, DEPTH = 50, 31, 5


def walked(
    device: str,
    walk: Callable[..., Acceptance],
    logits: torch.Tensor,
    tree: DraftTree,
    params: list[SamplingParams],
    slots: list[int],
    first: list[int],
) -> Acceptance:
    noise = NoiseWindow(len(params) + 2, DEPTH + 1, VOCABULARY, device)
    noise.advance(slots, first, [p.seed for p in params], [0] * len(params))
    there = DraftTree(*(getattr(tree, field.name).to(device) for field in fields(DraftTree)))
    states = [ChoiceState(p, [1, 2], VOCABULARY, device) for p in params]
    return walk(logits.to(device), there, states, noise, slots, first, SamplingBatch.of(params, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paths_are_those_of_the_definition(device: str, dtype: torch.dtype) -> None:
    accepted = 0
    for seed in range(20):
        random.seed(seed)
        generator = torch.Generator().manual_seed(seed)
        batch = random.choice([1, 3, 16])
        truth = torch.randint(0, VOCABULARY, (batch, DEPTH + 1), generator=generator)
        candidates = random_candidates(generator, batch, 60, VOCABULARY, DEPTH, truth, 0.7)
        tree, _ = grow_tree(torch.zeros(batch, dtype=torch.int64), candidates, BUDGET, DEPTH)
        logits = torch.randn(batch, tree.num_rows, VOCABULARY, generator=generator)
        logits = logits.scatter_add(2, truth.gather(1, tree.depth)[..., None], torch.full((*tree.token.shape, 1), 7.0))
        logits = logits.to(dtype)
        params = [
            SamplingParams(
                temperature=random.choice([0.0, 0.7, 1.0]),
                top_p=random.choice([1.0, 0.9137]),
                top_k=random.choice([0, 20]),
                presence_penalty=0.5 if seed % 5 == 4 else 0.0,  # what needs a history takes the other way
                seed=b,
            )
            for b in range(batch)
        ]
        given = (logits, tree, params, random.sample(range(batch + 2), batch), [random.randint(3, 40) for _ in params])
        found, expected = walked(device, accept, *given), walked("cpu", accept_reference, *given)
        assert found.paths == expected.paths and found.num_accepted == expected.num_accepted
        assert torch.equal(found.tokens.cpu(), expected.tokens) and torch.equal(found.rows.cpu(), expected.rows)
        accepted += sum(found.num_accepted)
    assert accepted > 50

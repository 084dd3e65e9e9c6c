"""Expansion of chains: the native operation gives exactly what the vectorised one does."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specblock.cuda_ext.native import native_available
from specblock.drafter.expand import Leaves, expand_chain, expand_vectorised
from specblock.drafter.proposals import Proposals

pytestmark = pytest.mark.skipif(not native_available(), reason="the native library was not built")


@given(
    batch=st.integers(1, 4), leaves=st.integers(1, 5), slots=st.integers(1, 5), width=st.integers(1, 10),
    block=st.integers(0, 3), seed=st.integers(0, 100_000),
)  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_native_and_vectorised_candidates_are_equal(batch, leaves, slots, width, block, seed):
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    log_prob = torch.log_softmax(torch.randn(batch, leaves, slots, width, generator=generator), dim=-1)
    log_prob = log_prob.masked_fill(torch.rand(log_prob.shape, generator=generator) < 0.1, -torch.inf)
    proposals = Proposals(
        integers(50, batch, leaves, slots, width), log_prob.sort(dim=-1, descending=True).values,
        integers(width + 2, batch, leaves, slots),
    )  # fmt: skip
    ends = Leaves(
        node=integers(30, batch, leaves) - 1,
        depth=integers(9, batch, leaves),
        token=integers(50, batch, leaves),
        score=-torch.rand(batch, leaves, generator=generator) * 5,
        valid=integers(4, batch, leaves) > 0,
        hidden=torch.zeros(batch, leaves, 2),
        seen=torch.zeros(batch, leaves, 3, dtype=torch.bool),
    )
    native, expected = expand_chain(proposals, ends, 30, block), expand_vectorised(proposals, ends, 30, block)
    for field in fields(native):
        own, other = getattr(native, field.name), getattr(expected, field.name)
        assert own.dtype == other.dtype, field.name
        assert (
            torch.allclose(own, other, rtol=0, atol=0, equal_nan=True)
            if own.is_floating_point()
            else torch.equal(own, other)
        ), field.name


@given(seed=st.integers(0, 100_000), near=st.sampled_from([1e-5, 1e-7, 1e-9]))
@settings(max_examples=200, deadline=None)
def test_no_node_scores_above_its_parent_however_sure_it_is(seed, near):
    """Trees keep the best nodes: one that a rounded sum lifts above its parent would be kept without it."""
    generator = torch.Generator().manual_seed(seed)
    log_prob = -torch.rand(2, 3, 6, 2, generator=generator)
    sure = torch.rand(2, 3, 6, generator=generator) < 0.6
    log_prob[..., 0] = torch.where(sure, near * log_prob[..., 0], log_prob[..., 0])
    log_prob[..., 1] -= 1
    proposals = Proposals(torch.zeros(2, 3, 6, 2, dtype=torch.int64), log_prob, torch.full((2, 3, 6), 2))
    score = -10 * torch.rand(2, 3, generator=generator)
    node = torch.full((2, 3), -1)
    ends = Leaves(node, node + 1, node + 1, score, node < 0, torch.zeros(2, 3, 2), torch.zeros(2, 3, 3).bool())
    for found in (expand_chain(proposals, ends, 0, 0), expand_vectorised(proposals, ends, 0, 0)):
        behind = found.parent >= 0
        above = found.score.gather(1, found.parent.clamp(min=0))
        assert (found.score <= torch.where(behind, above, torch.inf)).all()

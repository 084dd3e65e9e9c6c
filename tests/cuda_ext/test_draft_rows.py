"""What a drafter's network does around its layers: the native calls are their parts, and check their input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specblock.cuda_ext.draft_rows import (
    HeadWeights,
    SlotInputWeights,
    draft_head,
    draft_head_reference,
    slot_inputs,
    slot_inputs_reference,
)
from specblock.cuda_ext.linear import PackedWeight, pack
from specblock.cuda_ext.native import native_available
from specblock.cuda_ext.noise import NoiseRows, gumbel
from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams

pytestmark = pytest.mark.skipif(not native_available(), reason="native operations were not built")
HIDDEN, VOCAB = 48, 90


def packed(outputs: int, inputs: int, coarse: bool = False) -> PackedWeight:
    return pack((torch.randn(outputs, inputs) / inputs**0.5).to(torch.bfloat16).float(), coarse)


def input_weights(slots: int, coarse: bool = False) -> SlotInputWeights:
    return SlotInputWeights(
        condition_norm=torch.rand(HIDDEN) + 0.5,
        condition_part=packed(HIDDEN, HIDDEN, coarse),
        token_norm=torch.rand(HIDDEN) + 0.5,
        token_part=packed(HIDDEN, HIDDEN, coarse),
        eps=1e-5,
        slots=torch.randn(slots, HIDDEN),
    )


@given(
    seed=st.integers(0, 10**6), batch=st.integers(0, 3), positions=st.integers(1, 5), slots=st.integers(1, 4),
    projects=st.booleans(), coarse=st.booleans(),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_rows_are_made_of_their_parts(
    seed: int, batch: int, positions: int, slots: int, projects: bool, coarse: bool
) -> None:
    torch.manual_seed(seed)
    weights, embedding = input_weights(slots, coarse), torch.randn(VOCAB, HIDDEN)
    projection = packed(HIDDEN, 3 * HIDDEN, coarse) if projects else None
    x = torch.randn(batch, positions, 3 * HIDDEN if projects else HIDDEN)
    token = torch.randint(0, VOCAB, (batch, positions))
    with torch.inference_mode():
        got = slot_inputs(x, token, embedding, weights, projection)
        wanted = slot_inputs_reference(x, token, embedding, weights, projection)
    assert got.shape == (batch, positions, slots, HIDDEN) and torch.equal(got, wanted)


def test_inputs_that_do_not_fit_are_refused() -> None:
    torch.manual_seed(0)
    weights, embedding = input_weights(2), torch.randn(VOCAB, HIDDEN)
    x, token = torch.randn(2, 3, HIDDEN), torch.randint(0, VOCAB, (2, 3))
    wrong = (
        (x, token + VOCAB, embedding, weights, None),
        (x, token - VOCAB, embedding, weights, None),
        (x, token[:1], embedding, weights, None),
        (x, token, embedding[:, :32], weights, None),
        (x.double(), token, embedding, weights, None),
        (x, token, embedding, weights, packed(HIDDEN, 3 * HIDDEN)),
        (x, token, embedding, replace(weights, slots=torch.randn(2, 32)), None),
        (x, token, embedding, replace(weights, token_norm=torch.rand(32)), None),
    )
    with torch.inference_mode():
        for given_ in wrong:
            with pytest.raises(RuntimeError):
                slot_inputs(*given_)


def ranked(requests: int, each: int, seed: int, noisy: bool) -> tuple[SamplingBatch, NoiseRows | None]:
    params = [SamplingParams(temperature=float(b % 2) or 0.7, top_p=0.9, seed=seed + b) for b in range(requests)]
    sampling = SamplingBatch.of(params)
    if not noisy:
        return sampling, None
    rows = sampling.repeated(each)
    storage = gumbel(rows.seed, rows.choice, torch.arange(requests * each), VOCAB)
    return sampling, NoiseRows(storage, torch.randperm(requests * each))


@given(
    seed=st.integers(0, 10**6), requests=st.integers(1, 4), each=st.integers(1, 5), noisy=st.booleans(),
    biased=st.booleans(), partial=st.booleans(), coarse=st.booleans(), width=st.integers(1, 9),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_the_head_is_its_parts(
    seed: int, requests: int, each: int, noisy: bool, biased: bool, partial: bool, coarse: bool, width: int
) -> None:
    torch.manual_seed(seed)
    outputs = 70 if partial else VOCAB
    ids = torch.randperm(VOCAB)[:outputs].sort().values if partial else None
    weights = HeadWeights(
        norm=torch.rand(HIDDEN) + 0.5, eps=1e-5, head=packed(outputs, HIDDEN, coarse), bias=torch.randn(4, outputs)
    )
    bias_rows = torch.randint(0, 4, (requests,)) if biased else None
    sampling, noise = ranked(requests, each, seed, noisy)
    hidden = torch.randn(requests * each, HIDDEN)
    with torch.inference_mode():
        normed, best = draft_head(hidden, weights, bias_rows, noise, ids, sampling, 1.3, width, 20)
        wanted, parts = draft_head_reference(hidden, weights, bias_rows, noise, ids, sampling, 1.3, width, 20)
    assert torch.equal(normed, wanted)
    assert torch.equal(best.index, parts.index) and torch.equal(best.top, parts.top)
    assert torch.equal(best.log_prob, parts.log_prob)


def test_a_head_that_does_not_fit_is_refused() -> None:
    torch.manual_seed(0)
    weights = HeadWeights(norm=torch.rand(HIDDEN), eps=1e-5, head=packed(VOCAB, HIDDEN), bias=torch.randn(2, VOCAB))
    sampling, noise = ranked(2, 3, 0, True)
    hidden, rows = torch.randn(6, HIDDEN), torch.tensor([0, 1])
    assert noise is not None
    wrong = (
        (hidden, weights, torch.tensor([0, 2]), noise, None, sampling, 1.0, 4, 4),
        (hidden, weights, torch.tensor([0]), noise, None, sampling, 1.0, 4, 4),
        (hidden, replace(weights, bias=torch.randn(2, 5)), rows, noise, None, sampling, 1.0, 4, 4),
        (hidden[:5], weights, rows, noise, None, sampling, 1.0, 4, 4),  # not as many rows of each request
        (hidden[:4], weights, rows, noise, None, sampling, 1.0, 4, 4),  # noise of six
        (hidden, weights, rows, noise, None, sampling, 1.0, VOCAB + 1, 4),
        (hidden[:, :32].contiguous(), weights, rows, noise, None, sampling, 1.0, 4, 4),
    )
    with torch.inference_mode():
        for given_ in wrong:
            with pytest.raises(RuntimeError):
                draft_head(*given_)

"""Sampling parameters, and the processed distribution against transformers' own warpers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams, processed_log_probs


def warped(logits_V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(torch.zeros(1, 1, dtype=torch.int64), logits_V[None])[0].log_softmax(dim=-1)


def random_params(draw_seed: int) -> SamplingParams:
    generator = torch.Generator().manual_seed(draw_seed)
    values = torch.rand(8, generator=generator).tolist()
    return SamplingParams(
        temperature=0.2 + 1.8 * values[0],
        top_k=int(values[1] * 40) if values[2] < 0.5 else 0,
        top_p=0.05 + 0.95 * values[3] if values[4] < 0.6 else 1.0,
        min_p=0.5 * values[5] if values[6] < 0.4 else 0.0,
    )


@pytest.mark.parametrize("case", range(300))
def test_processed_distribution_equals_the_warpers(case):
    logits = torch.randn(64, generator=torch.Generator().manual_seed(case), dtype=torch.float64) * 3
    params = random_params(case)
    ours = processed_log_probs(logits[None], SamplingBatch.of([params]))[0]
    expected = warped(logits, params)
    assert torch.equal(ours.isinf(), expected.isinf())
    assert torch.allclose(ours.exp(), expected.exp(), atol=1e-12)
    assert float(ours.exp().sum()) == pytest.approx(1.0, abs=1e-12)


def test_rows_do_not_depend_on_the_batch():
    params = [random_params(case) for case in range(40)] + [SamplingParams(temperature=0), SamplingParams()]
    logits = torch.randn(len(params), 100, generator=torch.Generator().manual_seed(1)) * 2
    batch = SamplingBatch.of(params)
    together = processed_log_probs(logits, batch)
    for row, one in enumerate(params):
        alone = processed_log_probs(logits[row : row + 1], SamplingBatch.of([one]))[0]
        assert torch.equal(alone, together[row])
    order = torch.randperm(len(params), generator=torch.Generator().manual_seed(2))
    assert torch.equal(processed_log_probs(logits[order], batch.rows(order)), together[order])


def test_large_vocabularies_with_small_and_huge_nuclei():
    generator = torch.Generator().manual_seed(5)
    spread = torch.tensor([0.01, 0.5, 2.0, 4.0, 4.0, 1.0])
    logits = torch.randn(6, 3000, generator=generator, dtype=torch.float64) * spread[:, None]
    logits[4] = logits[4].round()  # many ties, also at the edges
    kinds = [
        SamplingParams(top_p=0.95),
        SamplingParams(top_k=2500, top_p=0.9),
        SamplingParams(min_p=1e-4, temperature=0.7),
        SamplingParams(top_k=1024),
        SamplingParams(top_k=5000, top_p=0.5),
        SamplingParams(),
    ]
    sizes = set()
    for shift in range(6):
        params = kinds[shift:] + kinds[:shift]
        ours = processed_log_probs(logits, SamplingBatch.of(params))
        for row, one in enumerate(params):
            alone = processed_log_probs(logits[row : row + 1], SamplingBatch.of([one]))[0]
            assert torch.equal(alone, ours[row])
            expected = warped(logits[row], one)
            sizes.add(int(ours[row].isfinite().sum()) > 1024)
            if row != 4:  # transformers keeps every token that ties with the last of top-k
                assert torch.equal(ours[row].isinf(), expected.isinf())
                assert torch.allclose(ours[row].exp(), expected.exp(), atol=1e-12)
    assert sizes == {True, False}, "both ways of finding the edge must have been taken"


def test_temperature_zero_is_a_point_mass_on_the_lowest_id():
    logits = torch.tensor([[1.0, 4.0, 4.0, -2.0]])
    ours = processed_log_probs(logits, SamplingBatch.of([SamplingParams(temperature=0, top_p=0.5, top_k=3)]))
    assert ours.tolist() == [[-math.inf, 0.0, -math.inf, -math.inf]]


def test_ties_at_a_filter_edge_keep_the_lowest_ids():
    logits = torch.zeros(1, 10)
    for params in (SamplingParams(top_k=4), SamplingParams(top_p=0.35)):
        kept = processed_log_probs(logits, SamplingBatch.of([params]))[0].isfinite()
        assert kept.tolist() == [True] * 4 + [False] * 6


@given(
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
    top_k=st.integers(0, 12),
    temperature=st.floats(0.05, 5.0),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=300, deadline=None)
def test_something_is_always_kept(top_p, min_p, top_k, temperature, seed):
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(seed)) * 5
    params = SamplingParams(temperature=temperature, top_p=top_p, min_p=min_p, top_k=top_k)
    kept = processed_log_probs(logits, SamplingBatch.of([params]))[0]
    assert bool(kept[int(logits.argmax())].isfinite()), "the most probable token always survives"
    assert int(kept.isfinite().sum()) <= (top_k or 10)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", 2**63),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((1, math.nan),)),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("choice", -1),
        ("choice", 2**32),
    ],
)
def test_bad_values_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}:"):
        SamplingParams(**{name: value})


def test_the_largest_values_allowed_fit_a_batch():
    params = SamplingParams(top_k=2**63 - 1, seed=-(2**63), choice=2**32 - 1, temperature=1e-5)
    batch = SamplingBatch.of([params, SamplingParams(seed=2**63 - 1)])
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(processed_log_probs(logits, batch).exp().sum(-1), torch.ones(2, dtype=torch.float64))


def test_needs_history():
    assert not SamplingParams(logit_bias=((1, 2.0),)).needs_history
    assert SamplingParams(repetition_penalty=1.1).needs_history
    assert SamplingParams(presence_penalty=0.1).needs_history
    assert SamplingParams(frequency_penalty=-0.1).needs_history

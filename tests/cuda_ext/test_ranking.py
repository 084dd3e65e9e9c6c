"""The native ranking of draft logits against its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specblock.cuda_ext.native import native_available
from specblock.cuda_ext.noise import NoiseRows, gumbel
from specblock.cuda_ext.ranking import best_tokens, ranked_reference
from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams
from tests.cuda_ext.test_choice import filters

pytestmark = pytest.mark.skipif(not native_available(), reason="the native library was not built")


@given(
    params=st.lists(filters, min_size=1, max_size=4),
    vocab_size=st.sampled_from([1, 3, 16, 21, 300, 1033]),
    width=st.integers(1, 12),
    noisy=st.booleans(),
    partial=st.booleans(),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=500, deadline=None)
def test_it_ranks_as_defined(params, vocab_size, width, noisy, partial, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(params), vocab_size, generator=generator) * 3
    batch = SamplingBatch.of(params)
    ids = torch.randperm(vocab_size + 9, generator=generator)[:vocab_size].sort().values if partial else None
    storage = gumbel(batch.seed, batch.choice, torch.arange(len(params)), vocab_size + 9 * partial)
    noise = NoiseRows(storage, torch.arange(len(params)).flip(0)) if noisy else None
    wanted = min(width, vocab_size), min(20, vocab_size)
    found = best_tokens(logits, noise, ids, batch, 1.4, *wanted)
    expected = ranked_reference(logits, noise, ids, batch, 1.4, *wanted)
    assert torch.equal(found.top, expected.top)
    kept = expected.log_prob.isfinite()
    agree = (kept == found.log_prob.isfinite()).all(dim=-1)
    for row in (~agree).nonzero().flatten().tolist():
        # A nucleus that ends within rounding of top_p may keep one token more or less; nothing else may.
        assert noisy and _ends_within_rounding(logits[row], params[row])
    kept = kept & agree[:, None]
    assert torch.allclose(found.log_prob[kept], expected.log_prob[kept], atol=2e-5)
    # Scores that are a rounding apart may change places, so a place is held by a token of the same score.
    score = _scores(logits, noise, ids, batch)
    assert torch.allclose(score.gather(1, found.index)[kept], score.gather(1, expected.index)[kept], atol=2e-5)


def _scores(logits: torch.Tensor, noise: NoiseRows | None, ids: torch.Tensor | None, batch: SamplingBatch):
    """What tokens are ranked by, before any is filtered away."""
    if noise is None:
        return logits
    gumbel_NV = (noise.rows() if ids is None else noise.rows()[:, ids]).float()
    greedy = (batch.temperature == 0)[:, None]
    temperature = torch.where(greedy, 1.0, batch.temperature.float()[:, None])
    return torch.where(greedy, logits, (logits / temperature + gumbel_NV) / 1.4)


def _ends_within_rounding(logits_V: torch.Tensor, params: SamplingParams) -> bool:
    if params.temperature == 0 or params.top_p >= 1:
        return False
    probs = (logits_V / params.temperature).softmax(dim=-1).sort(descending=True).values
    return bool((probs.cumsum(dim=-1) - params.top_p).abs().min() < 1e-5)


def test_equal_logits_come_in_the_order_of_their_ids_and_rows_do_not_depend_on_the_batch():
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]])
    one = SamplingBatch.of([SamplingParams(temperature=0)])
    assert best_tokens(logits, None, None, one, 1.0, 4, 2).index.tolist() == [[1, 2, 4, 0]]
    many = torch.randn(9, 200, generator=torch.Generator().manual_seed(1))
    batch = SamplingBatch.of([SamplingParams(seed=i, top_p=0.9) for i in range(9)])
    noise = NoiseRows(gumbel(batch.seed, batch.choice, torch.arange(9), 200), torch.arange(9))
    together = best_tokens(many, noise, None, batch, 0.7, 6, 20)
    for row in range(9):
        at = torch.tensor([row])
        alone = best_tokens(many[at], NoiseRows(noise.storage, at), None, batch.rows(at), 0.7, 6, 20)
        assert torch.equal(alone.index[0], together.index[row])
        assert torch.equal(alone.log_prob[0], together.log_prob[row])


def test_what_does_not_fit_is_refused():
    batch = SamplingBatch.of([SamplingParams()])
    storage = torch.zeros(1, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="more tokens wanted"):
        best_tokens(torch.zeros(1, 4), None, None, batch, 1.0, 5, 4)
    with pytest.raises(RuntimeError, match="out of range"):
        best_tokens(torch.zeros(1, 4), NoiseRows(storage, torch.tensor([1])), None, batch, 1.0, 2, 2)
    with pytest.raises(RuntimeError, match="ids are out of range"):
        ids = torch.tensor([0, 1, 2, 8])
        best_tokens(torch.zeros(1, 4), NoiseRows(storage, torch.tensor([0])), ids, batch, 1.0, 2, 2)

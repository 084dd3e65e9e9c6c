"""The native choice against its definition: the same tokens, whatever the filters, ties and types."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specblock.cuda_ext.choice import choose, choose_reference
from specblock.cuda_ext.linear import pack, swiglu
from specblock.cuda_ext.native import native_available
from specblock.cuda_ext.noise import NoiseRows, gumbel
from specblock.cuda_ext.ranking import best_tokens
from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams

pytestmark = pytest.mark.skipif(not native_available(), reason="the native library was not built")

filters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 1000]),
    min_p=st.sampled_from([0.0, 0.0, 0.03, 0.3, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
)


def drawn(params: list[SamplingParams], vocab_size: int, seed: int) -> tuple[SamplingBatch, NoiseRows]:
    batch = SamplingBatch.of(params)
    rows = gumbel(batch.seed, batch.choice, torch.arange(len(params)) + seed, vocab_size)
    order = torch.randperm(len(params), generator=torch.Generator().manual_seed(seed))
    return batch, NoiseRows(rows, order)


@given(
    params=st.lists(filters, min_size=1, max_size=5),
    vocab_size=st.sampled_from([1, 2, 7, 64, 1500]),
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.5, 3.0, 12.0]),
    wide=st.booleans(),
)
@settings(max_examples=500, deadline=None)
def test_choices_are_those_of_the_definition(params, vocab_size, seed, spread, wide):
    logits = torch.randn(len(params), vocab_size, generator=torch.Generator().manual_seed(seed)) * spread
    logits = logits.double() if wide else logits
    batch, noise = drawn(params, vocab_size, seed)
    assert torch.equal(choose(logits, batch, noise), choose_reference(logits, batch, noise))


# Shares of equal tokens do not sum to any of these, so rounding cannot move an edge.
uneven = st.builds(
    lambda params, top_p: replace(params, top_p=top_p), filters, st.sampled_from([1.0, 0.1237, 0.4991, 0.7773, 0.9619])
)


@given(params=st.lists(uneven, min_size=1, max_size=4), levels=st.integers(1, 4), seed=st.integers(0, 10_000))
@settings(max_examples=300, deadline=None)
def test_equal_logits_are_taken_in_the_order_of_their_ids(params, levels, seed):
    # Few distinct logits: nearly every edge of top-k and top-p lies among equals.
    logits = torch.randint(0, levels, (len(params), 50), generator=torch.Generator().manual_seed(seed)).float()
    batch, noise = drawn(params, 50, seed)
    assert torch.equal(choose(logits, batch, noise), choose_reference(logits, batch, noise))


@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([17, 64, 1500]),
    off=st.sampled_from([0.0, 1e-9, -1e-9, 3e-5, -3e-5]),
)
@settings(max_examples=150, deadline=None)
def test_edges_of_a_nucleus_that_float32_cannot_tell_are_found_exactly(seed, size, off):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, size, generator=generator) * 2
    mass = torch.softmax(logits.double(), dim=-1).sort(descending=True).values.cumsum(dim=-1)[0]
    edge = float(mass[int(torch.randint(0, min(size, 12), (1,), generator=generator))])
    # The noise wants tokens on both sides of the edge; exactly on it rounding decides, so that is left out.
    top_p = edge + (off or 1e-12)
    if not 0 < top_p < 1:
        return
    batch, noise = drawn([SamplingParams(temperature=1.0, top_p=top_p, seed=seed)], size, seed)
    for row in range(8):
        noise.storage.copy_(torch.randn(1, size, generator=generator, dtype=torch.float64) * (1 + row))
        assert torch.equal(choose(logits, batch, noise), choose_reference(logits, batch, noise))


def test_a_row_does_not_depend_on_the_batch():
    params = [SamplingParams(temperature=0.8, top_p=0.9, top_k=k, seed=k) for k in range(12)]
    logits = torch.randn(12, 300, generator=torch.Generator().manual_seed(0)) * 3
    batch, noise = drawn(params, 300, 3)
    together = choose(logits, batch, noise)
    for row in range(12):
        one = torch.tensor([row])
        alone = choose(logits[one], batch.rows(one), NoiseRows(noise.storage, noise.index[one]))
        assert int(alone) == int(together[row])


def test_what_is_filtered_away_is_never_chosen():
    # The noise prefers what the nucleus leaves out; several candidates must be passed over.
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0, -2.0]])
    noise = NoiseRows(torch.tensor([[0.0, 0.5, 9.0, 10.5, 12.0, 13.5]], dtype=torch.float64), torch.tensor([0]))
    one = SamplingBatch.of([SamplingParams(top_p=0.5)])
    assert choose(logits, one, noise).tolist() == [0]
    assert choose(logits, SamplingBatch.of([SamplingParams(top_k=3)]), noise).tolist() == [2]
    assert choose(logits, SamplingBatch.of([SamplingParams(min_p=0.3)]), noise).tolist() == [0]
    assert choose(logits, SamplingBatch.of([SamplingParams()]), noise).tolist() == [5]


def test_rows_outside_the_noise_are_refused():
    logits, batch = torch.zeros(1, 4), SamplingBatch.of([SamplingParams()])
    storage = torch.zeros(2, 4, dtype=torch.float64)
    for index in (-1, 2):
        with pytest.raises(RuntimeError, match="out of range"):
            choose(logits, batch, NoiseRows(storage, torch.tensor([index])))
    with pytest.raises(RuntimeError, match="does not fit"):
        choose(torch.zeros(1, 5), batch, NoiseRows(storage, torch.tensor([0])))


def test_one_nan_makes_every_log_probability_one():
    logits = torch.tensor([[1.0, float("nan"), 2.0]])
    noise = NoiseRows(torch.zeros(1, 3, dtype=torch.float64), torch.tensor([0]))
    for params in (SamplingParams(), SamplingParams(top_p=0.5, top_k=2), SamplingParams(temperature=0.7, min_p=0.1)):
        batch = SamplingBatch.of([params])
        assert choose(logits, batch, noise).tolist() == choose_reference(logits, batch, noise).tolist()


def test_a_bfloat16_row_is_chosen_alike_beside_a_row_that_penalties_widened():
    # Nine equal logits and a nucleus that ends exactly among them: the edge is a matter of the last bit.
    row = torch.full((1, 40), -30.0)
    row[0, :9] = 3.0
    noise = NoiseRows(torch.zeros(1, 40, dtype=torch.float64), torch.tensor([0]))
    noise.storage[0, 3] = 9.0
    batch = SamplingBatch.of([SamplingParams(top_p=1 / 3)])
    narrow = choose(row.to(torch.bfloat16), batch, noise)
    assert torch.equal(narrow, choose(row.double(), batch, noise)) and torch.equal(narrow, choose(row, batch, noise))


def test_the_number_of_threads_changes_nothing():
    params = [SamplingParams(temperature=0.8, top_p=0.9, seed=seed) for seed in range(5)]
    batch, noise = drawn(params, 20_011, 1)
    logits = torch.randn(5, 20_011, generator=torch.Generator().manual_seed(1)) * 3
    gate, up, down = (pack(torch.randn(shape, generator=torch.Generator().manual_seed(2)))
                      for shape in ((1009, 8), (1009, 8), (8, 1009)))  # fmt: skip
    x = torch.randn(201, 8, generator=torch.Generator().manual_seed(3))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        best = best_tokens(logits, noise, None, batch, 1.0, 8, 20)
        results.append((choose(logits, batch, noise), best.index, best.log_prob, best.top, swiglu(x, gate, up, down)))
    torch.set_num_threads(1)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))

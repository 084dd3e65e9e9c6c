"""Philox known answers, independence of the batch, and the law of the noise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specblock.cuda_ext import noise as module
from specblock.cuda_ext.native import native_available
from specblock.cuda_ext.noise import NoiseWindow, gumbel, philox4x32

# Known answers published with Random123 (philox4x32-10).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    k0, k1 = (torch.tensor([word]) for word in key)
    assert tuple(int(word) for word in philox4x32((c0, c1, c2, c3), (k0, k1))) == expected


def test_philox_words_have_the_broadcast_shape():
    words = philox4x32(
        (torch.arange(3)[None, :], torch.arange(2)[:, None], torch.zeros(1, 1).long(), torch.zeros(1, 1).long()),
        (torch.ones(2, 1).long(), torch.ones(2, 1).long()),
    )
    assert [word.shape for word in words] == [(2, 3)] * 4


def test_gumbel_is_the_documented_function_of_the_counter():
    seed, choice, position, token = -5, 2, 77, 9
    counter = (torch.tensor(token // 4), torch.tensor(position), torch.tensor(choice), torch.tensor(0))
    key = (torch.tensor(seed & 0xFFFFFFFF), torch.tensor((seed >> 32) & 0xFFFFFFFF))
    uniform = (int(philox4x32(counter, key)[token % 4]) + 0.5) / 2**32
    row = gumbel(torch.tensor([seed]), torch.tensor([choice]), torch.tensor([position]), 11)
    assert row.shape == (1, 11)
    assert float(row[0, token]) == pytest.approx(-math.log(-math.log(uniform)), rel=1e-14)


def test_gumbel_does_not_depend_on_the_batch_or_the_vocabulary():
    seeds = torch.tensor([3, -(2**63), 2**63 - 1, 3, 3])
    choices = torch.tensor([0, 1, 2**32 - 1, 1, 0])
    positions = torch.tensor([0, 5, 4096, 0, 1])
    together = gumbel(seeds, choices, positions, 50)
    for row in range(5):
        alone = gumbel(seeds[row : row + 1], choices[row : row + 1], positions[row : row + 1], 13)
        assert torch.equal(alone[0], together[row, :13])
    assert len({tuple(row.tolist()) for row in together}) == 5, "seed, choice and position must all matter"


def test_gumbel_law():
    noise = gumbel(torch.arange(400), torch.zeros(400).long(), torch.full((400,), 7), 500).flatten()
    assert torch.isfinite(noise).all()
    ordered = noise.sort().values
    law = torch.exp(-torch.exp(-ordered))
    empirical = (torch.arange(len(ordered), dtype=torch.float64) + 0.5) / len(ordered)
    kolmogorov = float((law - empirical).abs().max()) * math.sqrt(len(ordered))
    assert kolmogorov < 1.95  # p of about 1e-3
    # Neighbouring tokens, positions and seeds must be uncorrelated.
    grid = law.new_tensor(noise.tolist()).view(400, 500) - noise.mean()
    for shifted in (grid[:, 1:] * grid[:, :-1], grid[1:] * grid[:-1]):
        assert abs(float(shifted.mean())) < 4 * float(noise.var()) / math.sqrt(shifted.numel())


@pytest.mark.parametrize("counted", [False, True])
def test_noise_window_equals_gumbel(counted):
    window = NoiseWindow(num_slots=4, width=5, vocab_size=17)
    assert window.width == 5
    generator = torch.Generator().manual_seed(0)
    first = {0: 10, 2: 3, 3: 1000}
    seeds = {0: 1, 2: -7, 3: 2**40}
    for _ in range(40):
        slots = [slot for slot in first if torch.rand(1, generator=generator) < 0.7]
        count = int(torch.randint(1, 6, (1,), generator=generator)) if counted else 5
        window.advance(
            slots, [first[s] for s in slots], [seeds[s] for s in slots], list(slots), count if counted else None
        )
        for slot in slots:
            positions = torch.arange(first[slot], first[slot] + count)
            expected = gumbel(torch.full((count,), seeds[slot]), torch.full((count,), slot), positions, 17)
            assert torch.equal(window.rows(torch.tensor(slot), positions).rows(), expected)
            first[slot] += int(torch.randint(1, 9, (1,), generator=generator))


def test_rows_from_the_host_are_those_of_device_tensors():
    window = NoiseWindow(3, 5, 7)
    slots, first = [2, 0], [11, 4]
    window.advance(slots, first, [5, 6], [0, 1])
    by_tensor = window.rows(torch.tensor(slots)[:, None], torch.tensor(first)[:, None] + torch.arange(4))
    by_host = window.rows_from(slots, first, 4)
    assert torch.equal(by_host.index, by_tensor.index) and torch.equal(by_host.rows(), by_tensor.rows())


def test_noise_window_reset_forgets_the_old_request():
    window = NoiseWindow(num_slots=2, width=3, vocab_size=8)
    window.advance([1], [40], [5], [0])
    window.reset(1)
    window.advance([1], [2], [6], [0])
    expected = gumbel(torch.tensor([6]), torch.tensor([0]), torch.tensor([4]), 8)[0]
    assert torch.equal(window.rows(torch.tensor(1), torch.tensor(4)).rows()[0], expected)


def test_noise_of_many_new_requests_is_computed_in_bounded_passes(monkeypatch):
    whole, parts = NoiseWindow(6, 5, 16), NoiseWindow(6, 5, 16)
    wanted = list(range(6)), [10 * s for s in range(6)], [s - 3 for s in range(6)], [s % 2 for s in range(6)]
    whole.advance(*wanted)
    passes: list[int] = []

    def counted(seed, choice, position, vocab_size):
        passes.append(len(seed) * vocab_size)
        return gumbel(seed, choice, position, vocab_size)

    monkeypatch.setattr(module, "gumbel", counted)
    monkeypatch.setattr(module, "_PASS_VALUES", 70)
    parts.advance(*wanted)
    assert max(passes) <= 70 and sum(passes) == 6 * 5 * 16
    assert torch.equal(parts._rows, whole._rows)


@pytest.mark.skipif(not native_available(), reason="native operations were not built")
@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**31)), max_size=5
    ),
    vocab_size=st.integers(1, 70),
)
def test_the_native_numbers_are_those_of_the_reference(rows, vocab_size):
    seed, choice, position = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).unbind(1)
    vectors = [v.contiguous() for v in (seed, choice, position)]
    expected = module.philox_uniform(*vectors, vocab_size)
    assert torch.equal(torch.ops.specblock.philox_uniform(*vectors, vocab_size), expected)
    assert torch.equal(gumbel(seed, choice, position, vocab_size), -torch.log(-torch.log(expected)))


@pytest.mark.skipif(not native_available(), reason="native operations were not built")
def test_the_native_numbers_refuse_what_does_not_fit():
    one, two = torch.zeros(1).long(), torch.zeros(2).long()
    for arguments, message in (
        ((one, two, one, 5), "one length"),
        ((one, one.int(), one, 5), "int64"),
        ((one, one, one, 0), "positive"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.specblock.philox_uniform(*arguments)
    torch.library.opcheck(torch.ops.specblock.philox_uniform.default, (two, two, two, 7))

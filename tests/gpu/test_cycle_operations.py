"""The operations of a cycle on every device: the integers of the CPU, whatever the shapes, filters, ties and types."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from specblock.cuda_ext.choice import choose, choose_reference
from specblock.cuda_ext.native import cuda_native_available, has_kernel, native_available
from specblock.cuda_ext.noise import NoiseRows, gumbel, philox_uniform
from specblock.cuda_ext.ops import commit_rows, commit_rows_vectorised, find_child, grow_tree, grow_tree_vectorised
from specblock.cuda_ext.pair_gains import PairGains, PairStrength, follow_chain, follow_chain_reference
from specblock.cuda_ext.ranking import best_tokens, ranked_reference
from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams
from specblock.cuda_ext.tree import Candidates, DraftTree
from specblock.drafter.expand import Leaves, expand_chain, expand_vectorised
from specblock.drafter.proposals import Proposals
from tests.random_pairs import random_pairs, random_proposals
from tests.random_trees import random_candidates

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KERNELS = (
    "philox_uniform",
    "choose",
    "accept_walk",
    "commit_rows",
    "draft_top",
    "expand_chain",
    "follow_chain",
    "grow_tree",
)
# Shares of equal tokens do not sum to any of these, so the order of a sum cannot move an edge.
NUCLEI = (1.0, 1.0, 0.1237, 0.4991, 0.7773, 0.9619)
POISON = -77

pytestmark = pytest.mark.skipif(not native_available(), reason="the native library was not built")


def rounds(device: str, on_cuda: int) -> Iterator[int]:
    """Seeds; a tenth of them on the CPU, whose operations have tests of their own."""
    for seed in range(on_cuda if device == "cuda" else max(2, on_cuda // 10)):
        random.seed(seed)
        torch.manual_seed(seed)
        yield seed


def on(device: str, *tensors: Tensor) -> list[Tensor]:
    """Copies on ``device``, whose allocator hands out memory full of nonsense afterwards."""
    moved = [tensor.to(device) for tensor in tensors]
    for size in (64, 512, 4096, 32768):
        [torch.full((size,), POISON, device=device) for _ in range(8)]
    return moved


def some_sampling(count: int) -> SamplingBatch:
    return SamplingBatch.of(
        [
            SamplingParams(
                temperature=random.choice([0.0, 0.3, 1.0, 1.0, 1.7]),
                top_p=random.choice(NUCLEI),
                top_k=random.choice([0, 0, 1, 2, 5, 40, 1000]),
                min_p=random.choice([0.0, 0.0, 0.03, 0.3, 1.0]),
                seed=random.randrange(2**63),
            )
            for _ in range(count)
        ]
    )


def moved_sampling(sampling: SamplingBatch, device: str) -> SamplingBatch:
    return SamplingBatch(*(getattr(sampling, field.name).to(device) for field in fields(sampling)))


def some_logits(*shape: int) -> Tensor:
    """Of random spread and type; sometimes few distinct values, numbers that are none, or infinite ones."""
    logits = torch.randn(shape) * random.choice([0.5, 3.0, 12.0])
    kind = random.random()
    if kind < 0.3:
        logits = torch.randint(-2, random.randint(0, 4), shape).float()
    elif kind < 0.35:
        logits.view(-1)[random.randrange(logits.numel())] = torch.nan
    elif kind < 0.4:
        logits[torch.rand(shape) < 0.5] = -torch.inf
    return logits.to(random.choice(TYPES))


@pytest.mark.gpu
def test_every_kernel_is_there() -> None:
    if not cuda_native_available("choose"):
        pytest.skip("the library was built without CUDA")
    assert all(cuda_native_available(name) for name in KERNELS)


@pytest.mark.parametrize("device", DEVICES)
def test_uniform_numbers_have_the_same_bits(device: str) -> None:
    for seed in rounds(device, 20):
        for vocab_size in (1, 3, 11, 4096, 128256) if seed == 0 else (random.randint(1, 5000),):
            vectors = [torch.randint(-(2**63), 2**63 - 1, (7,)), *torch.randint(0, 2**32, (2, 7))]
            moved = on(device, *vectors)
            if not has_kernel("philox_uniform", moved[0]):
                pytest.skip("no kernel here")
            found = torch.ops.specblock.philox_uniform(*moved, vocab_size)
            assert torch.equal(found.cpu(), philox_uniform(*vectors, vocab_size))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("vocab_size", "most_rows", "repeats"), [(11, 64, 300), (4096, 9, 80), (128256, 4, 20)])
def test_choices_are_those_of_the_cpu(device: str, vocab_size: int, most_rows: int, repeats: int) -> None:
    for _ in rounds(device, repeats):
        count = random.randint(1, most_rows)
        logits, sampling = some_logits(count, vocab_size), some_sampling(count)
        noise = gumbel(sampling.seed, sampling.choice, torch.arange(count), vocab_size + random.choice([0, 3]))
        order = torch.randperm(count)
        expected = choose(logits, sampling, NoiseRows(noise, order))
        moved, there = on(device, logits, noise, order), moved_sampling(sampling, device)
        for _ in range(3):  # a race would show as a change
            found = choose(moved[0], there, NoiseRows(*moved[1:]))
            assert torch.equal(found.cpu(), expected)
        if vocab_size < 100:
            reference = choose_reference(logits, sampling, NoiseRows(noise[:, :vocab_size], order))
            assert torch.equal(expected, reference) or not bool(logits.isfinite().all())


def some_candidates(batch: int, seed: int) -> Candidates:
    num_raw = random.choice([1, 2, 12, 32, 33, 64, 300] if seed % 20 else [1360, 4096])
    generator = torch.Generator().manual_seed(seed)
    raw = random_candidates(generator, batch, num_raw, random.choice([2, 5, 50]), random.randint(1, 9))
    shape = random.choice(["any", "any", "any", "chain", "star"])
    parent, depth, score = raw.parent, raw.depth, raw.score
    if shape == "chain" and num_raw < 100:
        parent = torch.arange(-1, num_raw - 1).expand(batch, -1).contiguous()
        depth, score = parent + 2, -(parent + 2) / 2
    if shape == "star":
        parent, depth = torch.full_like(parent, -1), torch.ones_like(depth)
    if random.random() < 0.3:
        score = torch.where(torch.rand(score.shape) < 0.5, 0.0, -0.0)  # nothing but ties
    valid = torch.ones_like(raw.valid)
    if random.random() < 0.4:  # nothing invalid has children
        valid = torch.rand(valid.shape) < 0.9
        for index in range(num_raw):
            above = parent[:, index]
            valid[:, index] &= (above < 0) | valid[torch.arange(batch), above.clamp(min=0)]
    return Candidates(raw.token, parent, score, depth, raw.block, raw.slot, raw.rank, valid)


@pytest.mark.parametrize("device", DEVICES)
def test_trees_are_those_of_the_reference(device: str) -> None:
    for seed in rounds(device, 140):
        batch = random.choice([1, 2, 16, 64])
        raw = some_candidates(batch, seed)
        depth, budget = int(raw.depth.max()), random.choice([0, 1, 7, 31, 63, 64, 400])
        roots, merge = torch.arange(batch) + 100, random.random() < 0.8
        expected, expected_offers = grow_tree_vectorised(roots, raw, budget, depth, merge)
        moved = on(device, roots, *(getattr(raw, field.name) for field in fields(raw)))
        tree, offers = grow_tree(moved[0], Candidates(*moved[1:]), budget, depth, merge)
        for found, wanted in ((tree, expected), (offers, expected_offers)):
            for field in fields(found):
                assert torch.equal(getattr(found, field.name).cpu(), getattr(wanted, field.name)), (seed, field.name)


def some_tree(batch: int, num_rows: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    shape = random.choice(["any", "any", "chain", "star"])
    row = torch.arange(num_rows)
    parent = {"chain": row - 1, "star": row * 0, "any": (torch.rand(batch, num_rows) * row).long()}[shape]
    parent = parent.clamp(min=0).expand(batch, -1).contiguous()
    size = torch.randint(1, num_rows + 1, (batch, 1)) if random.random() < 0.5 else num_rows
    parent = torch.where(row < size, parent, row)  # padding rows point to themselves
    return torch.randint(0, vocab_size, (batch, num_rows)), parent


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("vocab_size", "batches", "repeats"), [(11, (1, 2, 64), 200), (4096, (1, 7), 40), (128256, (1, 4), 6)]
)
def test_walks_are_those_of_single_choices(
    device: str, vocab_size: int, batches: tuple[int, ...], repeats: int
) -> None:
    accepted = 0
    for _ in rounds(device, repeats):
        batch, num_rows = random.choice(batches), random.choice([1, 2, 9, 64]) if vocab_size < 9999 else 9
        token, parent = some_tree(batch, num_rows, vocab_size)
        logits, every = some_logits(batch, num_rows, vocab_size).float(), torch.arange(batch)
        for row in range(1, num_rows):  # so that paths are deep
            logits[every, parent[:, row], token[:, row]] += 40.0 * (torch.rand(batch) < 0.8)
        logits = logits.to(random.choice(TYPES))
        sampling, levels = some_sampling(batch), min(num_rows, random.choice([1, 3, 9]))
        seeds = torch.arange(12)
        noise = gumbel(seeds, seeds, seeds, vocab_size)
        noise_row = torch.randint(0, 12, (batch, levels))
        moved, law = on(device, logits, token, parent, noise, noise_row), moved_sampling(sampling, device).law
        if not has_kernel("accept_walk", moved[0]):
            pytest.skip("no kernel here")
        moved[0] = moved[0] if device == "cuda" else moved[0].double()
        tokens, rows, counts = (t.cpu() for t in torch.ops.specblock.accept_walk(*moved, *law))

        tree = DraftTree(token, parent, (parent != torch.arange(num_rows)).long(), *[token] * 3, token[:, 0])
        row = torch.zeros(batch, dtype=torch.int64)
        alive = torch.ones(batch, dtype=torch.bool)
        for level in range(levels):
            said = choose(logits[every, row], sampling, NoiseRows(noise, noise_row[:, level].contiguous()))
            assert torch.equal(tokens[:, level], torch.where(alive, said, -1))
            assert torch.equal(rows[:, level], torch.where(alive, row, level))
            assert torch.equal(alive, counts > level)
            child = find_child(tree, row, said)
            alive &= child >= 0
            row = torch.where(alive, child, row)
        accepted += int((counts - 1).sum())
    assert accepted > 0


@pytest.mark.parametrize("device", DEVICES)
def test_commits_move_only_what_they_should(device: str) -> None:
    for _ in rounds(device, 150):
        shape = (3, 6, 2, 80, random.choice([1, 3, 4, 8, 64, 128]))
        dtype = random.choice([torch.float32, torch.bfloat16, torch.float64, torch.uint8])
        guard = random.choice([1, 4, 16])  # also storage that is not aligned to vectors
        size = torch.Size(shape).numel()
        whole = torch.randint(0, 100, (size + 2 * guard,)).to(dtype)
        batch, moves = random.randint(1, 6), random.choice([1, 2, 9, 33])
        slots, start = torch.randperm(6)[:batch], torch.randint(0, 80 - 40, (batch,))
        rows = torch.stack([torch.randperm(40)[:moves] for _ in range(batch)])
        if random.random() < 0.7:
            rows = rows.sort(dim=1).values
        expected = whole.clone()
        commit_rows_vectorised(expected[guard:-guard].view(shape), slots, start, rows)
        there = on(device, whole, slots, start, rows)
        commit_rows(there[0][guard:-guard].view(shape), *there[1:])
        assert torch.equal(there[0].cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_chains_are_those_of_the_reference(device: str) -> None:
    for _ in rounds(device, 100):
        batch, leaves, slots, width = (random.randint(1, most) for most in (16, 8, 8, 10))
        log_prob = torch.randn(batch, leaves, slots, width) - 2
        log_prob[torch.rand(log_prob.shape) < 0.1] = -torch.inf
        token, fan_out = torch.randint(0, 99, log_prob.shape), torch.randint(-1, width + 2, log_prob.shape[:3])
        node, depth = torch.randint(-1, 50, (2, batch, leaves))
        score, valid = torch.randn(batch, leaves), torch.rand(batch, leaves) < 0.8
        none = torch.zeros(batch, leaves, 0)
        there = on(device, token, log_prob, fan_out, node, depth, node, score, valid, none, none)
        found = expand_chain(Proposals(*there[:3]), Leaves(*there[3:]), 37, 2)
        kept = Proposals(token, log_prob, fan_out)
        expected = expand_vectorised(kept, Leaves(node, depth, node, score, valid, none, none), 37, 2)
        for field in fields(found):
            if field.name == "score":  # the sum of a chain is rounded once there, and once per device here
                assert torch.allclose(found.score.cpu(), expected.score, atol=1e-5, equal_nan=True)
            else:
                assert torch.equal(getattr(found, field.name).cpu(), getattr(expected, field.name)), field.name


@pytest.mark.parametrize("device", DEVICES)
def test_chains_are_followed_as_by_the_reference(device: str) -> None:
    for seed in rounds(device, 100):
        generator = torch.Generator().manual_seed(seed)
        shape = tuple(random.randint(1, most) for most in (16, 8, 8, 64))
        known, how = random_pairs(80, 900, generator), PairStrength(0.5, random.random() < 0.5, 2.0)
        given = random_proposals(*shape, 80, generator)
        there = PairGains(*on(device, *(getattr(known, field.name) for field in fields(known))))
        with torch.no_grad():
            found = follow_chain(*on(device, *given), there, how)
            expected = follow_chain_reference(*given, known, how)
        assert torch.equal(found[0].cpu(), expected[0])
        assert torch.allclose(found[1].cpu(), expected[1], atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("vocab_size", "repeats"), [(11, 100), (4096, 60), (32000, 20)])
def test_rankings_are_those_of_the_reference(device: str, vocab_size: int, repeats: int) -> None:
    differ = rows = 0
    for _ in rounds(device, repeats):
        count = random.randint(1, 8)
        logits = (torch.randn(count, vocab_size) * 3).to(random.choice([torch.float32, torch.bfloat16]))
        sampling, noisy, partial = some_sampling(count), random.random() < 0.8, random.random() < 0.5
        storage = gumbel(sampling.seed, sampling.choice, torch.arange(count), vocab_size + 9)
        ids = torch.randperm(vocab_size + 9)[:vocab_size].sort().values
        wanted = 1.4, min(random.randint(1, 12), vocab_size), min(20, vocab_size)
        there = on(device, logits, storage, torch.arange(count).flip(0), ids)
        noise = NoiseRows(*there[1:3]) if noisy else None
        found = best_tokens(there[0], noise, there[3] if partial else None, moved_sampling(sampling, device), *wanted)
        plain = storage if partial else storage[:, :vocab_size]
        noise = NoiseRows(plain, torch.arange(count).flip(0)) if noisy else None
        expected = ranked_reference(logits.float(), noise, ids if partial else None, sampling, *wanted)
        assert torch.equal(found.top.cpu(), expected.top)
        assert all(len(set(row)) == len(row) for row in found.index.tolist())
        # A nucleus that ends within rounding of top_p may keep one token more; equal logits come in any order there.
        same = torch.isclose(found.log_prob.cpu(), expected.log_prob, atol=2e-5).all(dim=-1)
        assert bool((same | (sampling.top_p < 1)).all())
        differ, rows = differ + int((~same).sum()), rows + count
    assert differ <= rows // 50


@pytest.mark.gpu
def test_what_is_out_of_range_stays_inside_its_memory() -> None:
    if not cuda_native_available("commit_rows"):
        pytest.skip("the library was built without CUDA")
    there = torch.randn(2, 3, 2, 10, 8, device="cuda")
    before = there.clone()
    for slot, start, rows in (
        (3, 0, [0, 2]),
        (-1, 0, [0, 2]),
        (0, -1, [0, 2]),
        (0, 9, [0, 2]),
        (0, 0, [0, -1]),
        (2, 5, [0, 9]),
    ):
        given = (torch.tensor(value, device="cuda") for value in ([slot], [start], [rows]))
        commit_rows(there, *given)
    assert torch.equal(there, before)
    noise = gumbel(*torch.zeros(3, 1, dtype=torch.int64, device="cuda"), 50)
    sampling = SamplingBatch.of([SamplingParams()], "cuda")
    logits = torch.zeros(1, 50, device="cuda")
    for row in (-5, 2**40):
        clamped = choose(logits, sampling, NoiseRows(noise, torch.tensor([row], device="cuda")))
        assert torch.equal(clamped, noise.argmax(dim=-1))

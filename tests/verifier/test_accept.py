"""Acceptance on given logits: walks against the readable reference, ties, history, and what is left untouched."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specblock.cuda_ext import reference
from specblock.cuda_ext.noise import NoiseWindow, gumbel
from specblock.cuda_ext.ops import build_tree
from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams, processed_log_probs
from specblock.cuda_ext.tree import DraftTree, root_only
from specblock.verifier.accept import Acceptance, accept, accept_reference
from specblock.verifier.history import ChoiceState
from tests.strategies import RawTree, raw_trees, to_candidates

VOCAB, WIDTH = 6, 26


def run(
    logits: torch.Tensor,
    tree: DraftTree,
    params: list[SamplingParams],
    first: list[int],
    prompt: tuple[int, ...] = (),
    walk: Callable[..., Acceptance] = accept,
) -> Acceptance:
    batch = len(params)
    noise = NoiseWindow(batch, WIDTH, logits.shape[-1])
    drawn = [b for b in range(batch) if params[b].temperature > 0]
    seeds, choices = [params[b].seed for b in drawn], [params[b].choice for b in drawn]
    noise.advance(drawn, [first[b] for b in drawn], seeds, choices)
    states = [ChoiceState(p, prompt, logits.shape[-1]) for p in params]
    return walk(logits, tree, states, noise, list(range(batch)), first)


def own_choice(logits_V: torch.Tensor, params: SamplingParams, position: int) -> int:
    """The rule, literally."""
    if params.temperature == 0:
        return int(logits_V.argmax())
    log_probs = processed_log_probs(logits_V[None], SamplingBatch.of([params]))[0]
    key = [torch.tensor([value]) for value in (params.seed, params.choice, position)]
    return int((log_probs + gumbel(key[0], key[1], key[2], len(logits_V))[0]).argmax())


@given(
    trees=st.lists(raw_trees(), min_size=1, max_size=4),
    budget=st.integers(0, 20),
    seed=st.integers(0, 10**6),
    temperatures=st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5]), min_size=4, max_size=4),
)
@settings(max_examples=400, deadline=None)
def test_walk_equals_the_reference(trees, budget, seed, temperatures):
    tree = build_tree(torch.zeros(len(trees)).long(), to_candidates(trees), budget, max(max(t.depths) for t in trees))
    logits = torch.randn(len(trees), tree.num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2
    params = [SamplingParams(temperature=temperatures[b], seed=seed + b, top_p=0.9) for b in range(len(trees))]
    first = [3 + 7 * b for b in range(len(trees))]
    accepted, defined = (run(logits, tree, params, first, walk=walk) for walk in (accept, accept_reference))
    assert accepted.paths == defined.paths and accepted.num_accepted == defined.num_accepted
    assert torch.equal(accepted.tokens, defined.tokens) and torch.equal(accepted.rows, defined.rows)
    assert accepted.num_cols == max(accepted.num_accepted) + 1 == accepted.rows.shape[1]
    for b, raw in enumerate(trees):
        rows = reference.prune(reference.merge(raw.tokens, raw.parents, raw.scores), budget)
        row, tokens, path = 0, [], [0]
        while True:
            tokens.append(own_choice(logits[b, row], params[b], first[b] + len(tokens)))
            below = [r for r in range(1, len(rows)) if rows[r].parent == row and rows[r].token == tokens[-1]]
            if not below:
                break
            row = below[0]
            path.append(row)
        count = len(tokens)
        assert accepted.paths[b] == tuple(tokens)
        assert accepted.num_accepted[b] == count - 1
        assert accepted.tokens[b].tolist() == [*tokens, *[-1] * (accepted.num_cols - count)]
        assert accepted.rows[b].tolist() == [*path, *range(count, accepted.num_cols)]


def test_greedy_takes_the_lowest_id_on_ties():
    logits = torch.tensor([[[0.0, 3.0, 3.0, 1.0]]])
    tree = root_only(torch.tensor([0]))
    assert run(logits, tree, [SamplingParams(temperature=0)], [1]).paths == ((1,),)
    penalised = SamplingParams(temperature=0, presence_penalty=1.0)
    assert run(logits, tree, [penalised], [1]).paths == ((1,),)


def test_greedy_and_broken_logits_choose_as_defined():
    tree = root_only(torch.zeros(1).long())
    for row in ([1.0, torch.nan, 3.0], [torch.nan, 1.0, torch.nan], [torch.inf, -torch.inf, torch.inf]):
        logits = torch.tensor([[row]])
        a, b = (run(logits, tree, [SamplingParams(temperature=0)], [3], walk=w) for w in (accept, accept_reference))
        assert a.paths == b.paths == ((int(logits[0, 0].argmax()),),)


def test_penalties_count_the_path_and_leave_the_state_alone():
    raw = RawTree([1, 1, 2], [-1, 0, 1], [-1.0, -2.0, -3.0])
    tree = build_tree(torch.tensor([0]), to_candidates([raw]), 5, 3)
    logits = torch.tensor([0.0, 2.0, 1.5, 0.0]).expand(1, 4, 4)
    plain = run(logits, tree, [SamplingParams(temperature=0)], [1])
    assert plain.paths == ((1, 1, 1),)
    # Every occurrence costs 0.4: token 1 falls behind token 2 after two, and token 2 behind token 1 after one.
    params = SamplingParams(temperature=0, frequency_penalty=0.4)
    state = ChoiceState(params, (), 4)
    noise = NoiseWindow(1, 4, 4)
    for _ in range(2):  # the second call sees the same history: visiting is not committing
        assert accept(logits, tree, [state], noise, [0], [1]).paths == ((1, 1, 2, 1),)
    state.append([1, 1])
    assert accept(logits, tree, [state], noise, [0], [1]).paths == ((2,),)


def test_repetition_penalty_counts_the_prompt_and_presence_does_not():
    logits = torch.tensor([[[0.5, 1.0, 0.9, -1.0]]])
    tree = root_only(torch.tensor([0]))
    assert run(logits, tree, [SamplingParams(temperature=0, repetition_penalty=2.0)], [5], (1,)).paths == ((2,),)
    assert run(logits, tree, [SamplingParams(temperature=0, presence_penalty=2.0)], [5], (1,)).paths == ((1,),)


def test_states_without_penalties_keep_nothing():
    state = ChoiceState(SamplingParams(temperature=0.7, top_p=0.9), (1, 2), 4)
    state.append([3])
    assert not state.adjusts
    assert state.count_V is None


def test_bias_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="logit_bias: token 4 is outside the vocabulary of 4 tokens"):
        ChoiceState(SamplingParams(logit_bias=((4, 1.0),)), (), 4)


def test_only_visited_rows_matter():
    raw = RawTree([1, 2], [-1, -1], [-1.0, -2.0])
    tree = build_tree(torch.tensor([0, 0]), to_candidates([raw, raw], padding=2), 4, 1)
    logits = torch.full((2, 5, 4), torch.nan)
    logits[:, 0] = torch.tensor([0.0, 5.0, 0.0, 0.0])
    logits[:, 1] = torch.tensor([0.0, 0.0, 0.0, 5.0])
    params = [SamplingParams(temperature=0), SamplingParams(temperature=0.1)]
    assert run(logits, tree, params, [9, 9]).paths == ((1, 3), (1, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_walks_agree_over_large_vocabularies_and_filters(dtype):
    generator = torch.Generator().manual_seed(7)
    for seed in range(40):
        raw = RawTree([1, 2, 3, 1, 2], [-1, -1, 0, 2, 3], [-1.0, -2.0, -1.5, -1.7, -1.8])
        tree = build_tree(torch.zeros(3).long(), to_candidates([raw] * 3), 5, 4)
        logits = torch.randn(3, 6, 300, generator=generator)
        logits[..., 1:4] += 3 * torch.rand(1, generator=generator)  # what the trees hold is likely
        logits = logits.to(dtype)
        params = [
            SamplingParams(temperature=1.3, seed=seed, top_p=0.8),
            SamplingParams(temperature=0.7, seed=seed, top_k=5, min_p=0.05),
            SamplingParams(temperature=0.0),
        ]
        a, b = (run(logits, tree, params, [5, 600, 7], walk=walk) for walk in (accept, accept_reference))
        assert a.paths == b.paths and torch.equal(a.rows, b.rows) and torch.equal(a.tokens, b.tokens)


def test_prepared_parameters_change_nothing():
    generator = torch.Generator().manual_seed(3)
    params = [SamplingParams(temperature=t, seed=s, top_k=3) for s, t in enumerate((0.0, 1.0, 0.4))]
    tree = root_only(torch.zeros(3).long())
    logits = torch.randn(3, 1, 9, generator=generator)
    noise = NoiseWindow(3, 1, 9)
    noise.advance([1, 2], [4, 4], [1, 2], [0, 0])
    states = [ChoiceState(p, (), 9) for p in params]
    prepared = accept(logits, tree, states, noise, [0, 1, 2], [4, 4, 4], SamplingBatch.of(params))
    assert prepared.paths == run(logits, tree, params, [4, 4, 4]).paths

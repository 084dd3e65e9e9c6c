"""Speculation never changes the text: any tree, any sampling parameters, alone or batched."""

import pytest
import torch

from specblock.cuda_ext.sampling import SamplingParams
from specblock.verifier import accept as accept_module
from specblock.verifier import verify as verify_module
from specblock.verifier.accept import Acceptance
from tests.verifier.helpers import Request, TreeMaker, decode, random_requests, random_trees, tiny_target

VOCAB = 96
BOTH = pytest.mark.parametrize("family", ["llama", "qwen3"])


def mismatches(model, requests: list[Request], plain: list[list[int]], trees: TreeMaker, alone: bool = False) -> int:
    """How many tokens differ between plain decoding and decoding with ``trees``."""
    num_tokens = len(plain[0])
    if alone:
        out = [decode(model, [request], num_tokens, trees).tokens[0] for request in requests]
    else:
        out = decode(model, requests, num_tokens, trees).tokens
    return sum(a != b for ours, theirs in zip(out, plain, strict=True) for a, b in zip(ours, theirs, strict=True))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_text_does_not_depend_on_the_trees(family, dtype):
    model = tiny_target(family, dtype)
    requests = random_requests(1, 48, VOCAB)
    plain = decode(model, requests, 40)
    assert plain.accepted_drafts == 0
    hostile = random_trees(2, VOCAB)
    assert mismatches(model, requests, plain.tokens, hostile) == 0
    helpful = random_trees(3, VOCAB, truth=plain.tokens)
    speculated = decode(model, requests, 40, helpful)
    assert speculated.tokens == plain.tokens
    assert speculated.accepted_drafts / speculated.cycles > 1, "the trees must be good enough to test deep paths"


@BOTH
def test_text_does_not_depend_on_the_batch(family):
    model = tiny_target(family)
    requests = random_requests(4, 10, VOCAB)
    plain = decode(model, requests, 24).tokens
    for number, request in enumerate(requests):
        assert decode(model, [request], 24).tokens == [plain[number]]
        trees = random_trees(5, VOCAB, truth=[plain[number]])
        assert mismatches(model, [request], [plain[number]], trees) == 0


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, repetition_penalty=1.3),
        SamplingParams(temperature=0, frequency_penalty=1.5, presence_penalty=1.0),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.8, top_p=0.95),
        SamplingParams(temperature=1.2, top_k=5, frequency_penalty=0.7),
        SamplingParams(temperature=0.7, min_p=0.1, logit_bias=((3, 5.0), (4, -100.0))),
        SamplingParams(temperature=1.0, repetition_penalty=0.7, presence_penalty=-1.0, top_p=0.9),
    ],
)
def test_every_kind_of_parameter(params):
    model = tiny_target()
    requests = [
        Request(r.prompt, SamplingParams(**{n: getattr(params, n) for n in params.__slots__} | {"seed": i}))
        for i, r in enumerate(random_requests(6, 12, VOCAB))
    ]
    plain = decode(model, requests, 30)
    speculated = decode(model, requests, 30, random_trees(7, VOCAB, truth=plain.tokens, hit_rate=0.85))
    assert speculated.tokens == plain.tokens
    assert speculated.accepted_drafts / speculated.cycles > 1.2


def test_a_seed_and_choice_determine_the_text():
    model = tiny_target()

    def text(seed: int, choice: int) -> list[int]:
        return decode(model, [Request((5, 6), SamplingParams(seed=seed, choice=choice))], 12).tokens[0]

    assert text(1, 0) == text(1, 0)
    assert len({tuple(text(1, 0)), tuple(text(2, 0)), tuple(text(1, 1))}) == 3


def test_a_hundred_thousand_tokens_without_a_mismatch():
    model = tiny_target()
    requests = random_requests(8, 1000, VOCAB, longest_prompt=4)
    plain = decode(model, requests, 100)
    speculated = decode(model, requests, 100, random_trees(9, VOCAB, truth=plain.tokens, hit_rate=0.8, num_raw=8))
    ours, expected = torch.tensor(speculated.tokens), torch.tensor(plain.tokens)
    assert expected.numel() == 100_000
    assert int((ours != expected).sum()) == 0
    assert speculated.cycles < 70_000


# --- the check must catch wrong rules ---


def first_child_rule(logits, tree, states, noise, slots, first_position, sampling=None) -> Acceptance:
    """Wrong: takes the first child of each node whatever the target wants, then the target's token."""
    tokens, rows = [], []
    for b in range(logits.shape[0]):
        row, path, visited = 0, [], [0]
        while (children := ((tree.parent[b] == row) & (tree.depth[b] > 0)).nonzero()).numel():
            row = int(children[0])
            path.append(int(tree.token[b, row]))
            visited.append(row)
        tokens.append([*path, int(logits[b, row].argmax())])
        rows.append(visited)
    return accept_module._pack(tokens, rows, logits.device)


def ratio_rule(logits, tree, states, noise, slots, first_position, sampling=None) -> Acceptance:
    """Wrong: the ratio test u < p / q of a flat drafter, with u taken from the noise that also ranks the drafts."""
    chooser = accept_module.TokenChooser(states, noise, slots, logits.device, sampling)
    tokens, rows = [], []
    for b in range(logits.shape[0]):
        row, path, visited = 0, [], [0]
        while True:
            position = first_position[b] + len(path)
            own = int(chooser.choose([b], logits[b, row][None], [position]))
            gumbel_V = noise.rows(torch.tensor(slots[b]), torch.tensor(position)).rows()[0]
            children = ((tree.parent[b] == row) & (tree.depth[b] > 0)).nonzero().flatten().tolist()
            probs = logits[b, row].double().softmax(-1)
            ratio = probs * len(probs)
            uniform = 1 - torch.exp(-torch.exp(-gumbel_V))
            taken = next((c for c in children if uniform[tree.token[b, c]] < ratio[tree.token[b, c]]), None)
            if taken is None:
                tokens.append([*path, own])
                break
            row = taken
            path.append(int(tree.token[b, row]))
            visited.append(row)
        rows.append(visited)
    return accept_module._pack(tokens, rows, logits.device)


@pytest.mark.parametrize("rule", [first_child_rule, ratio_rule])
def test_wrong_rules_are_caught(monkeypatch, rule):
    model = tiny_target()
    requests = random_requests(10, 12, VOCAB)
    plain = decode(model, requests, 16).tokens
    trees = random_trees(11, VOCAB, truth=plain)
    monkeypatch.setattr(verify_module, "accept", rule)
    assert mismatches(model, requests, plain, trees) > 0


def test_a_wrong_child_is_caught(monkeypatch):
    model = tiny_target()
    requests = random_requests(12, 12, VOCAB)
    plain = decode(model, requests, 16).tokens

    def any_child(tree, row, token):
        match = (tree.parent == row[:, None]) & (tree.depth > 0) & (token >= 0)[:, None]
        found, index = match.max(dim=1)
        return torch.where(found, index, -1)

    monkeypatch.setattr(accept_module, "find_child", any_child)
    assert mismatches(model, requests, plain, random_trees(13, VOCAB, truth=plain)) > 0


def test_forgetting_the_path_in_penalties_is_caught(monkeypatch):
    model = tiny_target()
    params = SamplingParams(temperature=0, frequency_penalty=2.0)
    requests = [Request(r.prompt, params) for r in random_requests(14, 8, VOCAB)]
    plain = decode(model, requests, 30).tokens
    trees = random_trees(15, VOCAB, truth=plain, hit_rate=0.9)
    monkeypatch.setattr(accept_module.TokenChooser, "visit", lambda *_: None)
    assert mismatches(model, requests, plain, trees) > 0

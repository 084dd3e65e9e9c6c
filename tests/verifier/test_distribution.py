"""The law of the text: against transformers' processors step by step, and by chi-square on a tiny vocabulary."""

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specblock.cuda_ext.noise import gumbel
from specblock.cuda_ext.ops import build_tree
from specblock.cuda_ext.sampling import SamplingParams
from specblock.cuda_ext.tree import Candidates
from specblock.verifier import verify as verify_module
from specblock.verifier.model import TargetModel
from tests.verifier.helpers import Request, TreeMaker, decode, plain, random_requests, random_trees, tiny_hf_model
from tests.verifier.test_lossless import first_child_rule, ratio_rule


def naive_scores(params: SamplingParams, sequence: list[int], num_prompt: int, logits_V: torch.Tensor) -> torch.Tensor:
    """Processed log-probabilities by transformers' classes; presence and frequency by their definition."""
    ids, scores = torch.tensor([sequence]), logits_V[None]
    if params.logit_bias:
        scores = SequenceBiasLogitsProcessor([[[t], v] for t, v in params.logit_bias])(ids, scores)
    if params.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    for token in set(sequence[num_prompt:]):
        count = sequence[num_prompt:].count(token)
        scores[0, token] -= params.frequency_penalty * count + params.presence_penalty
    if params.temperature == 0:
        return scores[0]
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(ids, scores)[0].log_softmax(-1)


def naive_text(hf_model, request: Request, num_tokens: int) -> list[int]:
    """One token at a time, the whole sequence recomputed, no cache, no tree."""
    params, sequence = request.params, list(request.prompt)
    for _ in range(num_tokens):
        with torch.no_grad():
            logits = hf_model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, -1]
        scores = naive_scores(params, sequence, len(request.prompt), logits)
        if params.temperature > 0:
            key = [torch.tensor([v]) for v in (params.seed, params.choice, len(sequence))]
            scores = scores + gumbel(key[0], key[1], key[2], len(scores))[0]
        sequence.append(int(scores.argmax()))
    return sequence[len(request.prompt) :]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_plain_and_tree_decoding_equal_a_naive_loop(family):
    hf_model = tiny_hf_model(family)
    model = TargetModel.from_model(hf_model)
    requests = random_requests(20, 24, 96)
    expected = [naive_text(hf_model, request, 16) for request in requests]
    assert decode(model, requests, 16).tokens == expected
    assert decode(model, requests, 16, random_trees(21, 96, truth=expected)).tokens == expected


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_equals_transformers_generate(family):
    hf_model = tiny_hf_model(family)
    requests = [Request(r.prompt, SamplingParams(temperature=0)) for r in random_requests(22, 6, 96)]
    ours = decode(TargetModel.from_model(hf_model), requests, 40).tokens
    for request, text in zip(requests, ours, strict=True):
        prompt = torch.tensor([request.prompt])
        mask = torch.ones_like(prompt)
        full = hf_model.generate(prompt, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=0)
        assert full[0, prompt.shape[1] :].tolist() == text


# --- chi-square on 16 tokens: the joint law of the first two ---

SMALL_VOCAB, PROMPT = 16, (3, 9, 1)
TINY = {"vocab_size": SMALL_VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8}


def joint_law(hf_model, params: SamplingParams) -> torch.Tensor:
    """float64 [256]: enumerated probabilities of the first two tokens."""
    sequences = torch.tensor([[*PROMPT, token] for token in range(SMALL_VOCAB)])
    with torch.no_grad():
        logits = hf_model(input_ids=sequences, use_cache=False).logits
    first = naive_scores(params, list(PROMPT), len(PROMPT), logits[0, -2]).exp()
    rows = [naive_scores(params, s.tolist(), len(PROMPT), logits[i, -1].clone()) for i, s in enumerate(sequences)]
    return (first[:, None] * torch.stack(rows).exp()).flatten()


def chi_square_p(counts: torch.Tensor, law: torch.Tensor) -> float:
    """p-value, cells with fewer than 5 expected pooled; 0 if something impossible happened."""
    expected = law * counts.sum()
    if bool((counts[law == 0] > 0).any()):
        return 0.0
    large = expected >= 5
    observed = torch.cat([counts[large], counts[~large].sum()[None]])
    wanted = torch.cat([expected[large], expected[~large].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    degrees = torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, statistic / 2))


def noise_ranked_trees(seeds: list[int], choice: int = 0) -> TreeMaker:
    """Drafts that share the target's noise: at each depth the three tokens a flat drafter would rank first."""

    def make(members, roots, done):
        batch = len(members)
        position = torch.tensor([len(PROMPT) + d for d in done])
        seed, choices = torch.tensor([seeds[m] for m in members]), torch.full((batch,), choice)
        first = gumbel(seed, choices, position, SMALL_VOCAB).topk(3).indices
        second = gumbel(seed, choices, position + 1, SMALL_VOCAB).topk(2).indices
        token = torch.cat([first, second], dim=1)
        parent = torch.tensor([-1, -1, -1, 0, 0]).expand(batch, -1)
        score = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0]).expand(batch, -1)
        depth = torch.tensor([1, 1, 1, 2, 2]).expand(batch, -1)
        every = torch.ones_like(token, dtype=torch.bool)
        return build_tree(roots, Candidates(token, parent, score, depth, depth, depth, depth, every), 5, 2), 2

    return make


def observed_pairs(model: TargetModel, params: SamplingParams, trees_of, num_seeds: int) -> torch.Tensor:
    counts = torch.zeros(SMALL_VOCAB**2, dtype=torch.float64)
    for start in range(0, num_seeds, 2500):
        seeds = list(range(start, min(start + 2500, num_seeds)))
        names = {name: getattr(params, name) for name in params.__slots__}
        requests = [Request(PROMPT, SamplingParams(**(names | {"seed": seed}))) for seed in seeds]
        pairs = torch.tensor(decode(model, requests, 2, trees_of(seeds)).tokens)
        counts += torch.bincount(pairs[:, 0] * SMALL_VOCAB + pairs[:, 1], minlength=SMALL_VOCAB**2)
    return counts


LAWS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.8, top_p=0.9, frequency_penalty=1.0),
    SamplingParams(temperature=1.3, top_k=6, repetition_penalty=1.4, logit_bias=((2, 1.5),)),
]
TREES = {
    "plain": lambda _seeds: plain,
    "random": lambda seeds: random_trees(seeds[0], SMALL_VOCAB, depth=2, num_raw=6, budget=6),
    "shared noise": noise_ranked_trees,
}


@pytest.mark.parametrize(
    ("trees", "params"),
    [("plain", LAWS[0]), ("plain", LAWS[1]), ("random", LAWS[2]), ("shared noise", LAWS[0]), ("shared noise", LAWS[1])],
)
def test_two_tokens_follow_the_enumerated_law(trees, params):
    hf_model = tiny_hf_model(**TINY)
    law = joint_law(hf_model, params)
    assert float(law.sum()) == pytest.approx(1.0, abs=1e-12)
    counts = observed_pairs(TargetModel.from_model(hf_model), params, TREES[trees], 20_000)
    assert chi_square_p(counts, law) > 1e-3


@pytest.mark.parametrize("rule", [first_child_rule, ratio_rule])
def test_wrong_rules_break_the_law(monkeypatch, rule):
    hf_model = tiny_hf_model(**TINY)
    monkeypatch.setattr(verify_module, "accept", rule)
    counts = observed_pairs(TargetModel.from_model(hf_model), LAWS[0], TREES["shared noise"], 1_500)
    assert chi_square_p(counts, joint_law(hf_model, LAWS[0])) < 1e-6

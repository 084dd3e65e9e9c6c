"""What a verification reports about the target, and that it commits nothing."""

import pytest
import torch

from specblock.cuda_ext.noise import NoiseWindow
from specblock.cuda_ext.ops import build_tree
from specblock.cuda_ext.sampling import SamplingParams
from specblock.cuda_ext.tree import root_only
from specblock.verifier.history import ChoiceState
from specblock.verifier.result import topk_log_probs, topk_log_probs_reference
from specblock.verifier.verify import verify
from tests.random_trees import random_candidates
from tests.verifier.helpers import Request, decode, tiny_hf_model, tiny_target

PROMPTS = [[4, 9, 30, 2, 71], [8], [90, 1, 1]]
BIASED = SamplingParams(temperature=0, logit_bias=((7, 50.0),))
PARAMS = [SamplingParams(temperature=0), SamplingParams(seed=3), BIASED]


def prepared(family: str = "llama"):
    model = tiny_target(family)
    cache = model.new_cache(3, 40)
    for prompt in PROMPTS:
        slot = cache.allocate()
        if prompt[:-1]:
            model.prefill(cache, slot, prompt[:-1])
    return model, cache, [ChoiceState(p, prompt, 96) for p, prompt in zip(PARAMS, PROMPTS, strict=True)]


def helpful_trees(model):
    truth = [decode(model, [Request(tuple(q), p)], 6).tokens[0] for q, p in zip(PROMPTS, PARAMS, strict=True)]
    candidates = random_candidates(torch.Generator().manual_seed(2), 3, 12, 96, 4, torch.tensor(truth), 0.9)
    return build_tree(torch.tensor([q[-1] for q in PROMPTS]), candidates, 10, 4), truth


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_features_and_laws_belong_to_the_rows_of_the_path(family):
    model, cache, states = prepared(family)
    hf_model = tiny_hf_model(family)
    tree, truth = helpful_trees(model)
    result = verify(model, cache, [0, 1, 2], tree, 4, states, NoiseWindow(3, 5, 96), top_k=7)
    assert max(result.num_accepted) >= 2, "the trees must be good enough to test a path"
    width = max(result.num_accepted) + 1
    assert result.top_ids.shape == result.top_log_probs.shape == (3, width, 7)
    assert (result.top_ids.dtype, result.top_log_probs.dtype) == (torch.int32, torch.float32)
    assert result.features.shape == (3, width, model.feature_size)
    for b, prompt in enumerate(PROMPTS):
        count = result.num_accepted[b] + 1
        assert list(result.paths[b]) == truth[b][:count]
        text = torch.tensor([[*prompt, *truth[b][: count - 1]]])
        with torch.no_grad():
            full = hf_model(input_ids=text, use_cache=False, output_hidden_states=True)
        # Raw logits: the bias of the third request must not show.
        expected = full.logits[0, -count:].double()
        law = expected.log_softmax(-1)
        assert torch.allclose(result.logsumexp[b, :count].double(), expected.logsumexp(-1), atol=1e-4)
        assert torch.allclose(result.top_log_probs[b, :count].double(), law.topk(7).values, atol=1e-4)
        assert torch.equal(result.top_ids[b, :count].long(), law.topk(7).indices)
        hidden = torch.cat([full.hidden_states[layer + 1][0, -count:] for layer in model.feature_layers], dim=-1)
        assert torch.allclose(result.features[b, :count], hidden, atol=1e-4)


def test_nothing_is_committed_and_a_second_look_agrees():
    model, cache, states = prepared()
    tree, _ = helpful_trees(model)
    lengths = list(cache.lengths)
    noise = NoiseWindow(3, 5, 96)
    # A drafter that shares the noise has advanced it to the same choices already.
    noise.advance([1], [lengths[1] + 1], [3], [0])
    first = verify(model, cache, [0, 1, 2], tree, 4, states, noise)
    assert cache.lengths == lengths
    second = verify(model, cache, torch.tensor([0, 1, 2]), tree, 4, states, noise)
    assert first.paths == second.paths
    assert torch.equal(first.features, second.features)


def test_truncated_commit_continues_like_the_whole():
    model, cache, states = prepared()
    tree, truth = helpful_trees(model)
    noise = NoiseWindow(3, 5, 96)
    result = verify(model, cache, [0, 1, 2], tree, 4, states, noise)
    kept = [min(2, len(path)) for path in result.paths]
    cache.commit([0, 1, 2], result.rows, kept)
    roots = torch.tensor([path[k - 1] for path, k in zip(result.paths, kept, strict=True)])
    after = verify(model, cache, [0, 1, 2], root_only(roots), 0, states, noise)
    assert [path[0] for path in after.paths] == [truth[b][kept[b]] for b in range(3)]


def test_a_narrow_noise_window_is_refused():
    model, cache, states = prepared()
    tree, _ = helpful_trees(model)
    with pytest.raises(ValueError, match="noise window of 4 positions is too narrow"):
        verify(model, cache, [0, 1, 2], tree, 4, states, NoiseWindow(3, 4, 96))


def test_top_log_probs_of_a_small_vocabulary():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    top = topk_log_probs(logits, 32)
    assert top.ids.shape == (2, 3, 5)
    assert torch.allclose(top.log_probs.exp().sum(-1), torch.ones(2, 3), atol=1e-5)


@pytest.mark.parametrize("size", [1, 5, 63, 64, 1000, 4096])
@pytest.mark.parametrize("k", [0, 1, 32, 100])
def test_top_log_probs_are_those_of_the_reference(size, k):
    logits = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(size)) * 3
    top, wanted = topk_log_probs(logits, k), topk_log_probs_reference(logits, min(k, size))
    assert top.ids.dtype == torch.int32 and torch.equal(top.ids, wanted.ids)
    torch.testing.assert_close(top.log_probs, wanted.log_probs)
    torch.testing.assert_close(top.logsumexp, wanted.logsumexp)

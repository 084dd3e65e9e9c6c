"""The target forward: trees, chains, ragged batches, chunks, and what is refused."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from specblock.cuda_ext.ops import ancestor_mask, build_tree
from specblock.verifier.model import TargetModel, default_feature_layers
from tests.random_trees import random_candidates
from tests.verifier.helpers import tiny_hf_model, tiny_target

BOTH = pytest.mark.parametrize("family", ["llama", "qwen3"])
# Norms and rotary tables of transformers work in float32 whatever the weights are.
CLOSE = {torch.float64: 2e-5, torch.float32: 2e-4}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def tokens_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 96, shape, generator=torch.Generator().manual_seed(seed))


def independent(model: TargetModel, tokens_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and features of a whole sequence by transformers alone, without a cache."""
    with torch.no_grad():
        output = model._model(input_ids=tokens_S[None], use_cache=False, output_hidden_states=True)
    hidden = [output.hidden_states[layer + 1][0] for layer in model.feature_layers]
    return output.logits[0], torch.cat(hidden, dim=-1)


@BOTH
@DTYPES
def test_tree_forward_equals_every_path_alone(family, dtype):
    model = tiny_target(family, dtype)
    prompts = [tokens_of(1, 9), tokens_of(2, 1), tokens_of(3, 14)]
    cache = model.new_cache(3, 40)
    for prompt in prompts:
        model.prefill(cache, cache.allocate(), prompt)
    candidates = random_candidates(torch.Generator().manual_seed(4), 3, 14, 96, 5)
    tree = build_tree(tokens_of(5, 3), candidates, 12, 5)
    mask = ancestor_mask(tree, 5)
    output = model.forward(cache, [0, 1, 2], tree.token, tree_mask=mask, depth=tree.depth)
    assert output.logits.isfinite().all()
    assert output.features.isfinite().all()
    for b, prompt in enumerate(prompts):
        for row in range(int(tree.size[b])):
            path = tree.token[b, mask[b, row]]  # rows are ordered by depth
            logits, features = independent(model, torch.cat([prompt, path]))
            assert torch.allclose(output.logits[b, row], logits[-1], atol=CLOSE[dtype], rtol=CLOSE[dtype])
            assert torch.allclose(output.features[b, row], features[-1], atol=CLOSE[dtype], rtol=CLOSE[dtype])


@BOTH
@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_chunked_prefill_equals_one_pass(family, chunk):
    model = tiny_target(family)
    tokens = tokens_of(6, 23)
    cache = model.new_cache(2, 30)
    cache.allocate()
    features, logits = model.prefill(cache, cache.allocate(), tokens, chunk_tokens=chunk)
    expected_logits, expected_features = independent(model, tokens)
    assert features.shape == (23, model.feature_size)
    assert torch.allclose(features, expected_features, atol=2e-5)
    assert torch.allclose(logits, expected_logits[-1], atol=2e-5)
    assert cache.lengths == [0, 23]


@BOTH
def test_ragged_batch_equals_single(family):
    model = tiny_target(family)
    prompts = [tokens_of(seed, length) for seed, length in ((7, 3), (8, 17), (9, 8), (10, 1))]
    together, alone = model.new_cache(4, 30), model.new_cache(1, 30)
    for prompt in prompts:
        model.prefill(together, together.allocate(), prompt)
    slots = [2, 0, 3]  # neither ascending nor complete: rows are gathered
    new = tokens_of(11, 3, 4)
    batch = model.forward(together, slots, new)
    for b, slot in enumerate(slots):
        own = alone.allocate()
        model.prefill(alone, own, prompts[slot])
        single = model.forward(alone, [own], new[b : b + 1])
        assert torch.allclose(batch.logits[b], single.logits[0], atol=2e-5)
        assert torch.allclose(batch.features[b], single.features[0], atol=2e-5)
        alone.release(own)


def test_logits_only_where_wanted():
    model = tiny_target()
    tokens = tokens_of(12, 2, 5)
    everything = model.forward(model.new_cache(2, 8), [0, 1], tokens).logits
    some = model.forward(model.new_cache(2, 8), [0, 1], tokens, logits_rows=torch.tensor([[4, 0], [2, 2]])).logits
    assert torch.allclose(some, torch.stack([everything[0, [4, 0]], everything[1, [2, 2]]]), atol=1e-9)
    none = model.forward(model.new_cache(2, 8), [0, 1], tokens, logits_rows=torch.zeros(2, 0).long()).logits
    assert none.shape == (2, 0, 96)


def test_prefill_computes_one_row_of_logits():
    model = tiny_target()
    seen: list[torch.Size] = []
    hook = model._head.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape))
    model.prefill(model.new_cache(1, 30), 0, tokens_of(13, 20), chunk_tokens=8)
    hook.remove()
    assert [shape[1] for shape in seen] == [0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_and_stale_rows_never_leak(dtype):
    model = tiny_target(dtype=dtype)
    cache = model.new_cache(2, 24)
    model.prefill(cache, 0, tokens_of(14, 6))
    clean = model.forward(cache, [0], tokens_of(15, 1, 1)).logits
    # Staged and forgotten rows, then a padded forward whose mask is empty in padding.
    model.forward(cache, [0, 1], tokens_of(16, 2, 12))
    mask = torch.zeros(2, 5, 5, dtype=torch.bool)
    mask[:, 0, 0] = True
    tokens = torch.cat([tokens_of(15, 1, 1).expand(2, 1), torch.zeros(2, 4).long()], dim=1)
    output = model.forward(cache, [0, 1], tokens, tree_mask=mask)
    assert output.logits.isfinite().all()
    assert output.features.isfinite().all()
    assert torch.allclose(output.logits[0, 0], clean[0, 0], atol=0.05 if dtype == torch.bfloat16 else 1e-4)
    assert cache.lengths == [6, 0]


def test_works_inside_and_outside_inference_mode():
    model = tiny_target()
    with torch.inference_mode():
        cache = model.new_cache(1, 12)
        model.prefill(cache, 0, tokens_of(17, 4))
    outside = model.forward(cache, [0], tokens_of(18, 1, 3))
    assert not outside.features.is_inference()
    with torch.inference_mode():
        inside = model.forward(cache, [0], tokens_of(18, 1, 3))
    assert torch.equal(inside.logits, outside.logits)


def test_properties():
    model = tiny_target(num_hidden_layers=6, eos_token_id=[3, 5])
    assert (model.num_layers, model.hidden_size, model.vocab_size, model.feature_size) == (6, 32, 96, 96)
    assert model.feature_layers == (0, 2, 4)
    assert model.eos_token_ids == frozenset({3, 5})
    assert model.embedding.shape == (96, 32)
    assert not model.embedding.requires_grad
    assert (model.dtype, model.device.type, model.max_context_tokens) == (torch.float64, "cpu", 512)


def test_default_feature_layers():
    assert default_feature_layers(32) == (1, 15, 28)
    assert default_feature_layers(12) == (1, 5, 8)
    assert default_feature_layers(11) == (0, 4, 9)
    assert default_feature_layers(4) == (0, 1, 2)


@pytest.mark.parametrize("layers", [(0, 1), (0, 0, 1), (2, 1, 3), (0, 1, 4), (-1, 0, 1)])
def test_bad_feature_layers_are_refused(layers):
    with pytest.raises(ValueError, match="feature layers"):
        TargetModel.from_model(tiny_hf_model(), feature_layers=layers)


def test_two_layers_have_no_default_feature_layers():
    with pytest.raises(ValueError, match="feature layers"):
        tiny_target(num_hidden_layers=2)


def test_fingerprint_identifies_the_target():
    assert tiny_target().fingerprint == tiny_target().fingerprint
    assert tiny_target(dtype=torch.float32).fingerprint == tiny_target().fingerprint
    assert tiny_target(seed=1).fingerprint != tiny_target().fingerprint
    assert tiny_target("qwen3").fingerprint != tiny_target().fingerprint


def test_another_chat_template_is_another_target():
    source, tokenizer = tiny_hf_model(), byte_tokenizer()
    without = TargetModel.from_model(source, tokenizer).fingerprint
    tokenizer.chat_template = "{{ messages }}"
    one = TargetModel.from_model(source, tokenizer).fingerprint
    tokenizer.chat_template = "{{ messages }}!"
    other = TargetModel.from_model(source, tokenizer).fingerprint
    assert len({without, one, other}) == 3


SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def test_sliding_windows_are_refused():
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=16))
    with pytest.raises(ValueError, match="sliding"):
        TargetModel.from_model(model)
    with pytest.raises(ValueError, match="sliding"):
        TargetModel.from_model(Gemma2ForCausalLM(Gemma2Config(**SMALL)))


def test_full_attention_mistral_works():
    model = TargetModel.from_model(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)).double())
    _, logits = model.prefill(model.new_cache(1, 10), 0, tokens_of(19, 10), chunk_tokens=4)
    assert torch.allclose(logits, independent(model, tokens_of(19, 10))[0][-1], atol=2e-5)


def test_other_logit_scaling_is_refused():
    model = GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0))
    with pytest.raises(ValueError, match="computes its logits"):
        TargetModel.from_model(model)


def test_batch_dependent_rotary_embedding_is_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match="rotary"):
        tiny_target(rope_parameters=rope)


def test_eager_attention_is_refused():
    model = tiny_hf_model()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="sdpa"):
        TargetModel.from_model(model)


def test_load_reports_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        TargetModel.load(str(tmp_path / "absent"), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"no config\.json"):
        TargetModel.load(str(tmp_path), dtype=torch.float32)
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="target model"):
        TargetModel.load(str(tmp_path), dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_from_a_directory(tmp_path, dtype):
    source = tiny_hf_model("qwen3", torch.float32, eos_token_id=7)
    source.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model = TargetModel.load(str(tmp_path), dtype=dtype, feature_layers=(0, 2, 3))
    assert model.dtype == dtype
    assert model.feature_layers == (0, 2, 3)
    assert 7 in model.eos_token_ids
    assert model.tokenizer.decode(model.tokenizer("ab")["input_ids"]) == "ab"
    assert model.fingerprint == TargetModel.from_model(source, byte_tokenizer()).fingerprint


def byte_tokenizer():
    vocabulary = {chr(33 + i): i for i in range(90)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)

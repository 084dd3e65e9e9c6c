"""Native layers in the target: the same model, and a row's bits do not depend on its neighbours."""

import pytest
import torch
from transformers import DynamicCache

from specblock.cuda_ext.linear import PackedLinear
from specblock.cuda_ext.native import native_available
from specblock.cuda_ext.ops import ancestor_mask
from specblock.verifier.loading import cache_argument
from specblock.verifier.model import TargetModel
from specblock.verifier.native import ATTENTION, NativeAttention, NativeMLP, NativeNorm
from tests.verifier.helpers import decode, random_requests, random_trees, tiny_hf_model

pytestmark = pytest.mark.skipif(not native_available(), reason="native operations were not built")
BOTH = pytest.mark.parametrize("family", ["llama", "qwen3"])
VOCAB = 96


COARSE = pytest.mark.parametrize("coarse", [False, True])


def native_target(family: str, coarse: bool = False, **changes) -> TargetModel:
    model = tiny_hf_model(family, torch.float32, head_dim=16, **changes)
    return TargetModel.from_model(model, native=True, coarse=coarse)


def with_uneven_norms(model):
    """Norm weights that are not all one, so that none can be left out or taken for another."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))
    return model


@BOTH
def test_the_model_stays_the_model(family):
    untouched = with_uneven_norms(tiny_hf_model(family, torch.float32, head_dim=16))
    target = TargetModel.from_model(with_uneven_norms(tiny_hf_model(family, torch.float32, head_dim=16)), native=True)
    kinds = [type(module) for module in target.transformers_model.modules()]
    assert target.native and kinds.count(PackedLinear) == 4 * 7 + 1 and NativeNorm in kinds
    assert kinds.count(NativeAttention) == kinds.count(NativeMLP) == 4
    assert target.transformers_model.config._attn_implementation == ATTENTION
    tokens = torch.arange(20)[None]
    cache = target.new_cache(1, 64)
    with torch.no_grad():
        expected = untouched(input_ids=tokens).logits
        assert torch.allclose(target.forward(cache, [0], tokens).logits, expected, atol=1e-4)
    assert torch.equal(target.output_head, untouched.get_output_embeddings().weight)
    assert target.vocab_size == VOCAB


@BOTH
def test_whole_layers_over_slots_are_the_layers_under_masks(family):
    models = [with_uneven_norms(tiny_hf_model(family, torch.float32, head_dim=16)) for _ in range(2)]
    masks, slots = (
        TargetModel.from_model(m, native=True, by_slot=own) for m, own in zip(models, (False, None), strict=True)
    )
    assert masks.native and slots.native and masks.by_slot is None and slots.by_slot is not None
    caches = [target.new_cache(3, 64) for target in (masks, slots)]
    for target, cache in zip((masks, slots), caches, strict=True):
        assert cache.padding_rows == 0
        for slot in range(3):
            target.prefill(cache, cache.allocate(), list(range(slot, slot + 20 + slot)))
    tree = random_trees(1, VOCAB, num_raw=8, budget=8)([0, 0], torch.tensor([3, 5]), [0])[0]
    mask = ancestor_mask(tree, 5)
    want, got = (
        target.forward(cache, [2, 0], tree.token, tree_mask=mask, depth=tree.depth)
        for target, cache in zip((masks, slots), caches, strict=True)
    )
    assert torch.equal(got.logits, want.logits) and torch.equal(got.features, want.features)
    for slot, length in enumerate(caches[0].lengths):
        end = length + (tree.num_rows if slot != 1 else 0)
        torch.testing.assert_close(caches[1].keys[:, slot, :, :end], caches[0].keys[:, slot, :, :end])


@BOTH
@COARSE
def test_a_row_has_the_same_bits_alone_in_a_tree_and_in_a_batch(family, coarse):
    target = native_target(family, coarse)
    cache = target.new_cache(3, 64)
    for slot in range(3):
        target.prefill(cache, cache.allocate(), list(range(slot, slot + 20 + slot)))
    alone = target.forward(cache, [1], torch.tensor([[7]]))
    root_and_siblings = torch.eye(9, dtype=torch.bool)
    root_and_siblings[:, 0] = True
    depth = torch.tensor([[0] + [1] * 8])
    tokens = torch.tensor([[7, *range(8)]])
    tree = target.forward(cache, [1], tokens, tree_mask=root_and_siblings[None], depth=depth)
    assert torch.equal(tree.logits[:, :1], alone.logits) and torch.equal(tree.features[:, :1], alone.features)
    batch = target.forward(
        cache, [0, 1, 2], tokens.expand(3, -1), tree_mask=root_and_siblings.expand(3, -1, -1), depth=depth.expand(3, -1)
    )
    assert torch.equal(batch.logits[1], tree.logits[0])


@BOTH
@COARSE
def test_text_is_the_same_with_any_trees_and_any_batch(family, coarse):
    target = native_target(family, coarse)
    requests = random_requests(11, 24, VOCAB)
    expected = decode(target, requests, 40).tokens
    for trees in (random_trees(12, VOCAB), random_trees(13, VOCAB, truth=expected)):
        assert decode(target, requests, 40, trees).tokens == expected
    for request, tokens in list(zip(requests, expected, strict=True))[:6]:
        assert decode(target, [request], 40).tokens == [tokens]


def test_the_models_own_forward_knows_padding_and_chunks():
    untouched = tiny_hf_model("llama", torch.float32, head_dim=16)
    model = native_target("llama").transformers_model
    tokens = torch.arange(24).view(2, 12)
    padding = torch.ones(2, 12, dtype=torch.int64)
    padding[1, :5] = 0
    with torch.no_grad():
        padded = [m(input_ids=tokens, attention_mask=padding).logits[:, 5:] for m in (untouched, model)]
        assert torch.allclose(*padded, atol=1e-4)
        chunks = []
        for m in (untouched, model):
            cache = {cache_argument(m): DynamicCache(config=m.config)}
            m(input_ids=tokens[:, :8], use_cache=True, **cache)
            chunks.append(m(input_ids=tokens[:, 8:], use_cache=True, **cache).logits)
        assert torch.allclose(*chunks, atol=1e-4)


@pytest.mark.parametrize("nodes", [8, 100, 255])
def test_trees_of_every_size_leave_the_roots_bits_alone(nodes):
    target = native_target("llama")
    cache = target.new_cache(1, 300)
    target.prefill(cache, cache.allocate(), list(range(20)))
    alone = target.forward(cache, [0], torch.tensor([[7]]))
    mask = torch.eye(nodes + 1, dtype=torch.bool)
    mask[:, 0] = True
    tokens = torch.arange(nodes + 1)[None] % VOCAB
    tokens[0, 0] = 7
    tree = target.forward(cache, [0], tokens, tree_mask=mask[None], depth=torch.tensor([[0] + [1] * nodes]))
    assert torch.equal(tree.logits[:, :1], alone.logits)


@BOTH
def test_coarse_products_are_the_model_in_bfloat16_numbers(family):
    exact, coarse = (native_target(family, coarse) for coarse in (False, True))
    half = tiny_hf_model(family, torch.float32, head_dim=16).to(torch.bfloat16)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        wanted = half(input_ids=tokens).logits.float()
    found, precise = (target.forward(target.new_cache(1, 64), [0], tokens).logits for target in (coarse, exact))
    assert coarse.coarse and coarse.dtype == torch.float32 and not exact.coarse
    assert 0 < (found - precise).square().mean() < (wanted - precise).square().mean(), "bfloat16 everywhere is further"
    assert torch.equal(coarse.embedding, coarse.embedding.bfloat16().float())


def test_other_types_keep_their_own_layers():
    model = tiny_hf_model("llama", torch.float64)
    target = TargetModel.from_model(model, native=True)
    assert not target.native and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"}])
def test_layers_with_more_than_a_native_one_has_keep_their_own_code(changes):
    untouched = tiny_hf_model("llama", torch.float32, head_dim=16, **changes)
    model = tiny_hf_model("llama", torch.float32, head_dim=16, **changes)
    with torch.no_grad():
        for one in (untouched, model):
            torch.manual_seed(3)
            for name, weight in one.named_parameters():
                if name.endswith("bias"):
                    weight.copy_(torch.randn(weight.shape))
    target = TargetModel.from_model(model, native=True)
    kinds = [type(module) for module in target.transformers_model.modules()]
    assert (NativeAttention in kinds) == ("attention_bias" not in changes)
    assert (NativeMLP in kinds) == ("attention_bias" in changes)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = untouched(input_ids=tokens).logits
    assert torch.allclose(target.forward(target.new_cache(1, 64), [0], tokens).logits, expected, atol=1e-4)


def test_a_stack_serves_small_and_large_caches_in_any_order():
    target, fresh = native_target("llama"), native_target("llama")
    small, large = target.new_cache(1, 16), target.new_cache(1, 300)
    tokens = torch.arange(280)[None] % 90
    with torch.inference_mode():
        target.forward(small, [small.allocate()], tokens[:, :4])
        found = []
        for model, cache in ((target, large), (fresh, fresh.new_cache(1, 300))):
            slot = cache.allocate()
            model.prefill(cache, slot, tokens[0, :270])
            found.append(model.forward(cache, [slot], tokens[:, 270:276]).logits)
    assert torch.equal(*found)


def test_a_mask_and_depths_of_one_serve_a_batch():
    target = native_target("llama")
    tokens, depth = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[0, 1, 1]])
    mask = torch.tensor([[[True, False, False], [True, True, False], [True, False, True]]])
    both = []
    with torch.inference_mode():
        for seen, deep in ((mask, depth), (mask.expand(2, -1, -1), depth.expand(2, -1))):
            cache = target.new_cache(2, 20)
            slots = [cache.allocate(), cache.allocate()]
            both.append(target.forward(cache, slots, tokens, tree_mask=seen, depth=deep).logits)
    assert torch.equal(*both)

"""Fused layers give what transformers' own layers give, by slot and by mask; here through the references."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specblock.cuda_ext.ops import ancestor_mask
from specblock.verifier import model as model_module
from specblock.verifier.fused import FusedLayer
from specblock.verifier.model import TargetModel
from tests.recorders import FakeRecorder
from tests.verifier.helpers import decode, random_requests, random_trees, tiny_hf_model
from tests.verifier.test_native import with_uneven_norms
from tests.verifier.test_slots import VOCAB, filled, random_tree, with_graphs

FAMILIES = ["llama", "qwen3"]


@pytest.fixture(autouse=True)
def fused_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "can_fuse", lambda model: True)
    monkeypatch.setattr(model_module, "use_native_layers", lambda model, coarse: False)


def hf_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    return with_uneven_norms(tiny_hf_model(family, dtype))


def fused(family: str, by_slot: bool, dtype: torch.dtype = torch.float32) -> TargetModel:
    target = TargetModel.from_model(hf_model(family, dtype), native=True, by_slot=by_slot)
    assert target.fused and all(type(layer) is FusedLayer for layer in target.transformers_model.model.layers)
    return target


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("by_slot", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_logits_features_and_cache_are_those_of_transformers(family: str, by_slot: bool, recorded: bool) -> None:
    own, ours = TargetModel.from_model(hf_model(family)), fused(family, by_slot)
    assert not own.fused and own.fingerprint == ours.fingerprint
    if recorded and by_slot:
        ours = with_graphs(ours, FakeRecorder())
    lengths = [3, 9, 1]
    caches = [filled(target, lengths) for target in (own, ours)]
    for slots, rows in (([0, 1, 2], 5), ([2, 0], 9), ([1], 1)):
        tree = random_tree(len(slots), rows, rows)
        want, got = (
            target.forward(cache, slots, tree.token, tree_mask=ancestor_mask(tree, 5), depth=tree.depth)
            for target, cache in zip((own, ours), caches, strict=True)
        )
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.features, want.features, rtol=1e-4, atol=1e-4)
        for slot in slots:
            here = slice(0, lengths[slot] + tree.num_rows)
            for name in ("keys", "values"):
                found, wanted = (getattr(cache, name)[:, slot, :, here] for cache in reversed(caches))
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_that_of_transformers(family: str) -> None:
    requests = random_requests(3, 6, VOCAB)
    expected = decode(TargetModel.from_model(hf_model(family, torch.float64)), requests, 12).tokens
    target = fused(family, True, torch.float64)
    assert decode(target, requests, 12, random_trees(5, VOCAB, truth=expected)).tokens == expected


def test_half_precision_passes_the_check_and_the_weights_are_not_doubled() -> None:
    target = fused("qwen3", True, torch.bfloat16)
    assert target.by_slot is not None
    layer = target.transformers_model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    for group in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
        assert len({linear.weight.untyped_storage().data_ptr() for linear in group}) == 1
    names = [name for name, _ in target.transformers_model.named_parameters()]
    assert names == [name for name, _ in tiny_hf_model("qwen3").named_parameters()]


@pytest.mark.parametrize("broken", ["_by_slot", "_by_mask"])
def test_layers_that_fail_the_check_are_put_back(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = getattr(FusedLayer, broken)
    monkeypatch.setattr(FusedLayer, broken, lambda *args: own(*args) * 3)
    target = TargetModel.from_model(hf_model("llama"), native=True, by_slot=True)
    assert not target.fused and target.by_slot is not None
    assert len([r for r in caplog.records if "keeps its own layers" in r.getMessage()]) == 1
    reference = TargetModel.from_model(hf_model("llama"))
    tokens = torch.arange(7)[None]
    want, got = (t.forward(t.new_cache(1, 16), [0], tokens) for t in (reference, target))
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.features, want.features, rtol=1e-4, atol=1e-4)


def test_what_is_not_asked_for_stays() -> None:
    target = TargetModel.from_model(hf_model("llama"), native=False, by_slot=True)
    assert not target.fused and type(target.transformers_model.model.layers[0]).__name__ == "LlamaDecoderLayer"

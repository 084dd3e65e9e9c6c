"""Recorded forwards on a CUDA device: the same text, nothing that fails to record, no recording again after a swap."""

from __future__ import annotations

import pytest
import torch

from specblock.cuda_ext.ops import ancestor_mask
from specblock.daemon.engine import Engine, EngineSettings
from specblock.drafter.checkpoint import load_weights
from specblock.drafter.config import DraftSettings
from specblock.drafter.draft import BlockDrafter
from specblock.verifier.model import TargetModel
from tests.daemon.test_engine import drafter_of, random_requests, run, target_of
from tests.gpu.test_device import pair
from tests.verifier.helpers import tiny_hf_model
from tests.verifier.test_slots import filled, random_tree

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_text_with_graphs_is_text_without(family: str, caplog: pytest.LogCaptureFixture) -> None:
    requests = random_requests(12, seed=41)
    texts = []
    for graphs in (False, True):
        target, drafter = pair("cuda", torch.float64, family)
        assert target.by_slot is not None and drafter.by_slot is not None
        tokens, keep = run(target, drafter, requests, slots=5, graphs=graphs)
        texts.append((tokens, {name: state.accepted for name, state in keep.states.items()}))
    assert not [record for record in caplog.records if "no CUDA graph" in record.getMessage()]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 64])
def test_every_size_gives_the_logits_of_masks(dtype: torch.dtype, head_dim: int) -> None:
    shape = {"head_dim": head_dim, "initializer_range": 0.2}
    masks = TargetModel.from_model(tiny_hf_model("llama", dtype, **shape).cuda(), by_slot=False)
    slots = TargetModel.from_model(tiny_hf_model("llama", dtype, **shape).cuda())
    lengths = [3, 90, 1, 17, 2]
    caches = [filled(target, lengths, capacity=200) for target in (masks, slots)]
    slots.use_graphs(caches[1])
    for chosen in ([1], [3, 0], [0, 1, 2, 3], [4, 2, 1, 0, 3]):
        for rows in (1, 7, 16, 33, 91):
            tree = random_tree(len(chosen), rows, rows)
            tree = type(tree)(*(getattr(tree, name).cuda() for name in tree.__dataclass_fields__))
            mask = ancestor_mask(tree, 5)
            want, got, again = (
                target.forward(cache, chosen, tree.token, tree_mask=mask, depth=tree.depth).logits.float().clone()
                for target, cache in ((masks, caches[0]), (slots, caches[1]), (slots, caches[1]))
            )
            bound = 0.05 * float(want.abs().max()) if dtype == torch.bfloat16 else 1e-3
            torch.testing.assert_close(got, want, rtol=0, atol=bound)
            assert torch.equal(got, again), "the same graph over the same prefix"
    assert slots.num_graphs > 0 and slots.num_graph_failures == 0


def test_graphs_are_recorded_at_start_and_survive_a_swap() -> None:
    target = TargetModel.from_model(target_of("llama", torch.float32).transformers_model.cuda())
    drafter = BlockDrafter(drafter_of(target).model.cuda(), DraftSettings(node_budget=24))
    engine = Engine(target, drafter, EngineSettings(slots=3, capacity_tokens=160), lambda: 0.0, drafter_version="a")
    engine.use_graphs()
    recorded = target.num_graphs
    assert recorded >= 3 * 4 and target.num_graph_failures == 0
    weights = {name: value.cpu() * 1 for name, value in drafter.model.state_dict().items()}
    for request in random_requests(3, seed=42):
        engine.submit(request)
    assert drafter.by_slot is not None
    for cycle in range(8):
        if cycle == 4:
            load_weights(drafter.model, weights, "b")
        engine.step()
    assert drafter.by_slot.num_graphs > 0 and drafter.by_slot.num_failures == 0
    assert target.num_graphs == recorded and target.num_graph_failures == 0

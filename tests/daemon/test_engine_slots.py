"""The engine over forwards of fixed shapes, as a CUDA device has them, with recordings that need none."""

from __future__ import annotations

import pytest
import torch

from specblock.drafter.draft import BlockDrafter
from specblock.drafter.graphs import BlockGraphs
from specblock.drafter.kv_cache import DrafterCache
from specblock.verifier.model import TargetModel
from tests.daemon.test_engine import drafter_of, planner_of, random_requests, run, target_of
from tests.recorders import FakeRecorder
from tests.verifier.test_slots import with_graphs


@pytest.mark.parametrize("kind", ["specblock", "eagle3"])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("planned", [False, True])
def test_text_is_that_of_plain_decoding(kind: str, recorded: bool, planned: bool) -> None:
    requests = random_requests(12, seed=51)
    masks = target_of("llama", torch.float64)
    plain, _ = run(masks, None, requests, slots=1)
    target = TargetModel.from_model(target_of("llama", torch.float64).transformers_model, by_slot=True)
    other = drafter_of(target, kind)
    drafter = BlockDrafter(other.model, other.settings, by_slot=True)
    recorder, kept = FakeRecorder(), dict[int, BlockGraphs]()
    if recorded:
        with_graphs(target, recorder)
        assert drafter.by_slot is not None

        def graphs_of(cache: DrafterCache) -> BlockGraphs:
            return kept.setdefault(id(cache), BlockGraphs(drafter.device, len(cache.positions), recorder))

        drafter.by_slot.graphs, drafter.by_slot.graphs_over = True, graphs_of  # type: ignore[method-assign]
    tokens, keep = run(
        target, drafter, requests, slots=5, planner=planner_of(drafter, off_below=0.01) if planned else None
    )
    assert tokens == plain
    assert sum(sum(state.accepted) for state in keep.states.values()) > 0
    assert (recorder.replayed > recorder.recorded > 0) == recorded
    if not planned:
        _, usual = run(masks, drafter_of(masks, kind), requests, slots=5)
        assert {n: s.accepted for n, s in keep.states.items()} == {n: s.accepted for n, s in usual.states.items()}

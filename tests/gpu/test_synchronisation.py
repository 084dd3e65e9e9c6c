"""On a CUDA device, drafting and the target's forward queue their work and wait for none of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from specblock.cuda_ext.sampling import SamplingParams
from specblock.daemon.engine import Engine, EngineSettings
from specblock.daemon.messages import GenerationRequest
from tests.gpu.test_device import pair

pytestmark = pytest.mark.gpu


def without_waiting(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call``, in which every operation that waits for the device is an error."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it does not notice everything
            torch.cuda.set_sync_debug_mode("error")
        try:
            return call(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return guarded


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_drafting_and_the_forward_wait_for_nothing(
    graphs: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, drafter = pair("cuda", torch.float32)
    assert target.by_slot is not None
    assert drafter.by_slot is not None
    engine = Engine(target, drafter, EngineSettings(slots=3, capacity_tokens=120, prefill_chunk_tokens=7), lambda: 0.0)
    if graphs:
        engine.use_graphs()
    for index in range(3):
        sampling = SamplingParams(temperature=temperature, top_p=0.9, seed=index)
        prompt = tuple(range(2, 12 + index))
        engine.submit(
            GenerationRequest(
                request_id=str(index), prompt_tokens=prompt, sampling=sampling, max_tokens=60, ignore_eos=True
            )
        )
    for _ in range(6):  # records, and sets libraries up
        engine.step()
    monkeypatch.setattr(engine._drafting, "draft", without_waiting(engine._drafting.draft))
    monkeypatch.setattr(target, "forward", without_waiting(target.forward))
    for _ in range(3):
        engine.step()
    assert all(len(state.tokens) > 15 for state in engine.running)
    if graphs:
        assert target.num_graphs > 0 and target.num_graph_failures == 0
        assert drafter.by_slot.num_graphs > 0 and drafter.by_slot.num_failures == 0

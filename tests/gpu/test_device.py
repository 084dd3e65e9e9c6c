"""What must hold on every device. On the CPU these run with the other tests; ``make gpu-check`` runs them on CUDA."""

from __future__ import annotations

import pytest
import torch

from specblock.cuda_ext.noise import gumbel
from specblock.daemon.engine import Engine, EngineSettings
from specblock.daemon.engine_host import EngineHost
from specblock.daemon.windows import WindowLimits, WindowStore
from specblock.drafter.draft import BlockDrafter
from specblock.drafter.replay import replay
from specblock.drafter.train import TrainRun, TrainSettings
from specblock.verifier.model import TargetModel
from tests.daemon.test_engine import drafter_of, random_requests, run, target_of
from tests.drafter.helpers import random_window, tiny_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pair(device: str, dtype: torch.dtype, family: str = "llama") -> tuple[TargetModel, BlockDrafter]:
    """The same weights on every device."""
    base = target_of(family, dtype)
    drafter = drafter_of(base)
    target = TargetModel.from_model(base.transformers_model.to(device))
    return target, BlockDrafter(drafter.model.to(device), drafter.settings)


@pytest.mark.parametrize("device", DEVICES)
def test_noise_is_the_same_as_on_the_cpu(device: str) -> None:
    seed = torch.tensor([3, 2**61 + 5])
    position = torch.tensor([7, 900])
    here = gumbel(seed, torch.zeros_like(seed), position, 4096)
    there = gumbel(seed.to(device), torch.zeros_like(seed).to(device), position.to(device), 4096)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-12, atol=1e-12)
    assert torch.equal(there.cpu().argmax(-1), here.argmax(-1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_text_is_the_same_as_plain_decoding_on_the_cpu(device: str, family: str) -> None:
    requests = random_requests(16, seed=31)
    plain, _ = run(pair("cpu", torch.float64, family)[0], None, requests, slots=1)
    target, drafter = pair(device, torch.float64, family)
    drafted, keep = run(target, drafter, requests, slots=5)
    assert drafted == plain
    assert sum(sum(s.accepted) for s in keep.states.values()) > 0


@pytest.mark.parametrize("device", DEVICES)
def test_replay_equals_live(device: str) -> None:
    target, drafter = pair(device, torch.float64)
    _, keep = run(target, drafter, random_requests(16, seed=32), slots=4)
    windows = [w for w in keep.windows.values() if w.num_generated > 0]
    for window, found in zip(windows, replay(drafter, windows), strict=True):
        assert found.accepted == window.accepted
        assert window.features.device.type == window.top_ids.device.type == "cpu", "windows travel to the trainer"


@pytest.mark.parametrize("device", DEVICES)
def test_weights_from_the_host_are_swapped_in(device: str) -> None:
    target, drafter = pair(device, torch.float32)
    engine = Engine(target, drafter, EngineSettings(slots=1, capacity_tokens=20), lambda: 0.0, drafter_version="a")
    host = EngineHost(engine, WindowStore(WindowLimits(budget_bytes=10**6), lambda: 0.0), 0.0, 4)
    weights = {name: value.cpu().clone() for name, value in drafter.model.state_dict().items()}
    try:
        assert host.swap("b", weights, timeout_s=20.0).rows_stay_valid
        weights["layers.0.mlp.up_proj.weight"] = weights["layers.0.mlp.up_proj.weight"] * 1.5
        assert not host.swap("c", weights, timeout_s=20.0).rows_stay_valid
    finally:
        host.close()


@pytest.mark.parametrize("device", DEVICES)
def test_training_step_equals_the_cpu_in_float32_and_is_finite_in_bfloat16(device: str) -> None:
    windows = [random_window(i) for i in range(4)]

    def loss(where: str, autocast: bool) -> float:
        trained = TrainRun(tiny_model().to(where), TrainSettings(steps=3, autocast=autocast))
        return [float(trained.step(windows).draft) for _ in range(3)][-1]

    assert loss(device, False) == pytest.approx(loss("cpu", False), rel=1e-3)
    assert loss(device, True) == pytest.approx(loss("cpu", False), rel=0.1)

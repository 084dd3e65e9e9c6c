"""``bench roofline``: what is counted is what the shapes say, natively and not."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from specblock.cuda_ext.attention import tree_attention
from specblock.cuda_ext.linear import PackedLinear, can_pack, pack, swiglu
from specblock.cuda_ext.native import native_available
from specblock.cuda_ext.sampling import SamplingParams
from specblock.daemon.bench_roofline import Ceilings, Phase, cycles, measure, measured_ceilings, outside_forwards, table
from specblock.daemon.counted_work import Recorded, Work
from specblock.daemon.engine import Engine, EngineSettings
from specblock.daemon.messages import GenerationRequest
from specblock.drafter.layers import Linear
from specblock.verifier.model import TargetModel
from tests.daemon.test_engine import drafter_of, target_of
from tests.verifier.helpers import tiny_hf_model

INNER, SIZE, ROWS = 48, 32, 3


@pytest.mark.parametrize("native", [True, False])
def test_products_and_attention_are_counted_by_shape(native: bool) -> None:
    gate, up, down = torch.randn(INNER, SIZE), torch.randn(INNER, SIZE), torch.randn(SIZE, INNER)
    x, query, key = torch.randn(ROWS, SIZE), torch.randn(1, 4, ROWS, 16), torch.randn(1, 2, 20, 16)
    mask = torch.ones(1, ROWS, 20, dtype=torch.bool)
    native = native and can_pack(gate)
    with torch.inference_mode(), Work() as work:
        if native:
            packed = [pack(weight) for weight in (gate, up, down)]
            swiglu(x, *packed)
            tree_attention(query, key, key, mask)
        else:
            F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    products = 2 * ROWS * 3 * INNER * SIZE
    assert work.weight_bytes == 3 * INNER * SIZE * 4
    assert work.operations == products + (4 * 4 * ROWS * 16 * 20 if native else 0)
    assert work.cache_bytes == (2 * 2 * 20 * 16 * 4 if native else 0)


def test_a_models_forward_counts_the_same_in_native_layers_and_its_own() -> None:
    found = []
    for native in (True, False):
        target = TargetModel.from_model(tiny_hf_model("llama", torch.float32, head_dim=16), native=native)
        cache = target.new_cache(1, 32)
        slot = cache.allocate()
        with torch.inference_mode(), Work() as work:
            target.forward(cache, [slot], torch.zeros(1, 5, dtype=torch.int64))
        found.append(work)
    own, plain = found
    weights = sum(p.numel() for name, p in tiny_hf_model("llama", torch.float32, head_dim=16).named_parameters()
                  if p.ndim == 2 and "embed" not in name)  # fmt: skip
    assert plain.weight_bytes == 4 * weights
    assert plain.weight_bytes <= own.weight_bytes < 1.3 * plain.weight_bytes, "panels are filled up to 16 outputs"
    assert own.operations == plain.operations and own.operations > 2 * 5 * weights


def test_the_floor_is_the_larger_quotient() -> None:
    weight, x = torch.randn(64, 64), torch.randn(2, 64)
    ceilings = Ceilings(bytes_per_s=64 * 64 * 4 * 1e3, operations_per_s=2 * 2 * 64 * 64 * 1e2)
    with torch.inference_mode():
        alone, among = measure(
            [Phase("alone", lambda: F.linear(x, weight), True), Phase("more", lambda: F.linear(x, weight), False)],
            ceilings,
        )
    assert (alone.memory_floor_ms, alone.compute_floor_ms) == (pytest.approx(1.0), pytest.approx(10.0))
    assert alone.distance == pytest.approx(alone.measured_ms / 10) and among.distance is None
    assert "alone" in table({}, ceilings, [alone, among])


def test_ceilings_are_those_of_a_computer() -> None:
    found = measured_ceilings()
    assert 1e8 < found.bytes_per_s < 1e13 and 1e8 < found.operations_per_s < 1e14


@pytest.mark.skipif(not native_available(), reason="native operations were not built")
def test_a_drafting_cycle_counts_every_weight_once_and_its_forwards_can_be_made_again() -> None:
    target = target_of("llama", torch.float32, head_dim=16, native=True)
    drafter = drafter_of(target, blocks=1, rank_head=False)
    engine = Engine(target, drafter, EngineSettings(slots=1, capacity_tokens=64), time.perf_counter)
    sampling = SamplingParams(temperature=1.0, seed=3)
    engine.submit(GenerationRequest(request_id="a", prompt_tokens=(1, 2, 3), sampling=sampling, max_tokens=40,
                                    ignore_eos=True))  # fmt: skip
    for _ in range(2):
        engine.step()
    with Recorded() as recorded, Work() as work:
        engine.step()
    packed = [m.packed.panels for m in target.transformers_model.modules() if isinstance(m, PackedLinear)]
    network = drafter.model
    with torch.inference_mode():
        for name, linear in network.named_modules():
            if isinstance(linear, Linear) and "rank_head" not in name:
                packed += [piece.panels for piece in linear.packed_parts()[:2]]  # what slots add is not multiplied anew
    assert work.weight_bytes == sum(panels.numel() * panels.element_size() for panels in packed)
    assert len(recorded) == 5, "rows, layers and head of the drafter; layers and head of the target"
    with torch.inference_mode(), Work() as again:
        recorded.again()
    assert (again.weight_bytes, again.operations) == (work.weight_bytes, work.operations)
    assert not engine.idle


@pytest.mark.skipif(not native_available(), reason="native operations were not built")
def test_making_forwards_again_disturbs_no_cycle_that_is_measured() -> None:
    target = target_of("llama", torch.float32, head_dim=16, native=True)
    drafter = drafter_of(target, blocks=2)
    answers = []
    for disturbed in (False, True):
        _, _, drafting, alone = cycles(target, drafter)
        tokens: list[int] = []
        for _ in range(12):
            tokens += [token for chunk in drafting.call() for token in chunk.tokens]
            if disturbed:
                alone.call()
        answers.append(tokens)
    assert answers[0] == answers[1] and len(answers[0]) >= 12


def test_what_is_outside_of_forwards_is_a_share_of_the_cycle() -> None:
    x, weight = torch.randn(2, 64), torch.randn(64, 64)
    call = partial(F.linear, x, weight)
    rows = measure([Phase("kind of cycle", call, False), Phase("kind of cycle, its forwards alone", call, True)],
                   Ceilings(bytes_per_s=1e9, operations_per_s=1e9))  # fmt: skip
    whole, alone = (replace(row, measured_ms=ms) for row, ms in zip(rows, (4.0, 3.0), strict=True))
    assert outside_forwards([whole, alone]) == {"kind of cycle": 0.25}
    assert "outside of forwards: 25.0% of a kind of cycle" in table({}, Ceilings(bytes_per_s=1.0, operations_per_s=1.0),
                                                             [whole, alone])  # fmt: skip

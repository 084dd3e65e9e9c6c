"""What a decoder layer does between its products: the kernels give what the readable references give."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from specblock.cuda_ext.fused import (
    gated,
    gated_reference,
    rotary_heads,
    rotary_heads_reference,
    rotary_store,
    rotated_heads,
)
from specblock.cuda_ext.native import cuda_native_available, native_available, serves_cuda
from specblock.cuda_ext.norm import add_rms_norm, reference_norm, rms_norm
from specblock.verifier.fused import FusedLayer
from specblock.verifier.model import TargetModel

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = ("rms_norm", "add_rms_norm", "rotary_store", "rotary_heads", "gated")

pytestmark = [
    pytest.mark.skipif(not native_available(), reason="the native library was not built"),
    pytest.mark.usefixtures("without_gradients"),
]


@pytest.fixture
def without_gradients() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def some(*shape: int, device: str, dtype: torch.dtype, scale: float = 2.0) -> Tensor:
    return (torch.randn(shape) * scale).to(device, dtype)


def close(found: Tensor, wanted: Tensor) -> None:
    """Equal but for sums in another order, which move what is rounded next by a step of the number format."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    step = 2 * torch.finfo(found.dtype).eps if found.dtype != torch.float32 else 1e-5
    largest = float(wanted.float().abs().max()) if wanted.numel() else 0.0  # differences of large numbers may be small
    torch.testing.assert_close(found.float(), wanted.float(), rtol=step, atol=step * max(1.0, largest))


@pytest.mark.gpu
def test_every_kernel_is_there() -> None:
    if not cuda_native_available("choose"):
        pytest.skip("the library was built without CUDA")
    assert all(cuda_native_available(name) for name in KERNELS)
    assert serves_cuda("gated", *torch.zeros(2, 1, 16, device="cuda"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
def test_norms(device: str, dtype: torch.dtype) -> None:
    for size, shape in itertools.product((8, 16, 40, 264, 4096, 4104, 8192, 16384, 32768), ((1,), (2, 3), (0, 2))):
        x, more = (some(*shape, size, device=device, dtype=dtype) for _ in range(2))
        weight = some(size, device=device, dtype=dtype)
        close(rms_norm(x, weight, 1e-5), reference_norm(x, weight, 1e-5))
        total, normed = add_rms_norm(x, more, weight, 1e-6)
        assert torch.equal(total, x + more)
        close(normed, reference_norm(x + more, weight, 1e-6))
        if x.numel() and size <= 16384:  # longer rows may be PyTorch's, whose sums know their neighbours
            assert torch.equal(rms_norm(x[-1:], weight, 1e-5), rms_norm(x, weight, 1e-5)[-1:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_that_is_no_whole_number_of_vectors_or_not_contiguous(device: str, dtype: torch.dtype) -> None:
    for x in (
        some(3, 37, device=device, dtype=dtype),
        some(64, 3, device=device, dtype=dtype).t(),
        some(3 * 64 + 1, device=device, dtype=dtype)[1:].view(3, 64),
    ):
        weight = some(x.shape[-1], device=device, dtype=dtype)
        close(rms_norm(x, weight, 1e-5), reference_norm(x, weight, 1e-5))
        close(add_rms_norm(x, x, weight, 1e-5)[1], reference_norm(x + x, weight, 1e-5))
        close(gated(x, x + 1), gated_reference(x, x + 1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
def test_gated(device: str, dtype: torch.dtype) -> None:
    for shape in ((1, 16), (1, 2 * 14336), (2, 3, 96), (64, 200), (0, 32)):
        gate, up = some(*shape, device=device, dtype=dtype, scale=5.0).chunk(2, dim=-1)
        close(gated(gate, up), F.silu(gate) * up)
        close(gated(gate.contiguous(), up), F.silu(gate) * up)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("head_dim", [8, 32, 64, 96, 128, 256])
def test_rotary_store(device: str, dtype: torch.dtype, head_dim: int) -> None:
    for (batch, rows), (heads, kv_heads), normed in itertools.product(
        ((1, 1), (3, 5), (2, 64)), ((4, 2), (3, 3), (32, 8)), (False, True)
    ):
        qkv = some(batch, rows, (heads + 2 * kv_heads) * head_dim, device=device, dtype=dtype)
        angle = torch.rand(batch, rows, head_dim // 2).mul(6).repeat(1, 1, 2)
        rotary = angle.cos().to(device, dtype), angle.sin().to(device, dtype)
        weights = (some(head_dim, device=device, dtype=dtype), some(head_dim, device=device, dtype=dtype))
        norms = weights if normed else None
        whole = some(2, 2, 5, kv_heads, rows + 9, head_dim, device=device, dtype=dtype)
        before = whole.clone()
        slots = torch.randperm(5)[:batch].to(device)
        positions = (torch.randint(0, 9, (batch, 1)) + torch.arange(rows)).to(device)
        query = rotary_store(qkv, rotary, norms, 1e-6, whole[0, 1], whole[1, 1], slots, positions)
        parts = rotated_heads(qkv, rotary, norms, 1e-6, kv_heads)
        close(query, parts[0])
        for kind, part in enumerate(parts[1:]):
            close(whole[kind, 1][slots[:, None], :, positions], part)
            before[kind, 1][slots[:, None], :, positions] = whole[kind, 1][slots[:, None], :, positions]
        assert torch.equal(whole, before), "something else was written"
        if not normed:
            assert torch.equal(query, parts[0]), "nothing is summed, so bits are the same"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_rotary_heads(device: str, dtype: torch.dtype, head_dim: int) -> None:
    for batch, rows, heads in ((1, 1, 32), (3, 5, 8), (2, 64, 3)):
        x = some(batch, rows, heads * head_dim, device=device, dtype=dtype)
        angle = torch.rand(batch, rows, head_dim // 2).mul(6).repeat(1, 1, 2).to(device)
        found = rotary_heads(x, (angle.cos(), angle.sin()))
        assert torch.equal(found, rotary_heads_reference(x, (angle.cos(), angle.sin())))


@pytest.mark.gpu
def test_a_row_outside_of_the_cache_is_not_written() -> None:
    keys, values = torch.zeros(2, 2, 1, 4, 64, device="cuda")
    table = torch.ones(3, 1, 64, device="cuda")
    slots = torch.tensor([0, 2, -1], device="cuda")
    positions = torch.tensor([[4], [0], [0]], device="cuda")
    rotary_store(torch.ones(3, 1, 4 * 64, device="cuda"), (table, table), None, 0.0, keys, values, slots, positions)
    assert not keys.any() and not values.any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("graphs", [False, True])
def test_a_model_of_fused_layers_is_the_model(family: str, dtype: torch.dtype, graphs: bool) -> None:
    from tests.verifier.helpers import tiny_hf_model

    if not cuda_native_available("rotary_store"):
        pytest.skip("the library was built without CUDA")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "initializer_range": 0.06}
    own, ours = (
        TargetModel.from_model(tiny_hf_model(family, dtype, **sizes).cuda(), native=native, graphs=graphs)
        for native in (False, True)
    )
    assert ours.fused and not own.fused and ours.by_slot is not None
    assert all(type(layer) is FusedLayer for layer in ours.transformers_model.model.layers)
    caches = [target.new_cache(3, 128) for target in (own, ours)]
    bound = 1e-3 if dtype == torch.float32 else 0.05
    for target, cache in zip((own, ours), caches, strict=True):
        target.use_graphs(cache)
        for slot in range(3):
            target.prefill(cache, cache.allocate(), list(range(5 + 9 * slot)))
    for slots, rows in (([1], 1), ([0, 2], 7), ([2, 1, 0], 16), ([1], 1)):
        tokens = torch.randint(0, 96, (len(slots), rows), device="cuda")
        want, got = (t.forward(c, slots, tokens) for t, c in zip((own, ours), caches, strict=True))
        for found, wanted in ((got.logits, want.logits), (got.features, want.features)):
            atol = bound * float(wanted.float().abs().max())
            torch.testing.assert_close(found.float(), wanted.float(), rtol=bound, atol=atol)
    assert ours.num_graph_failures == 0 and (ours.num_graphs > 0) == graphs

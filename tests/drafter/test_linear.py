from __future__ import annotations

import pytest
import torch

from specblock.cuda_ext.native import native_available
from specblock.drafter.layers import Linear

pytestmark = pytest.mark.skipif(not native_available(), reason="native operations were not built")


def test_packed_drafting_follows_new_weights() -> None:
    linear, x = Linear(24, 40), torch.randn(5, 24)
    with torch.no_grad():
        linear.pack()
        for _ in range(2):
            assert torch.allclose(linear(x), x @ linear.weight.T, atol=1e-5)
            linear.weight.copy_(torch.randn(40, 24))  # a swap


def test_a_cast_or_a_birth_in_inference_mode_is_noticed() -> None:
    linear, x = Linear(24, 40), torch.randn(5, 24)
    with torch.no_grad():
        linear.pack()
        linear.double()
        assert torch.equal(linear(x.double()), x.double() @ linear.weight.T)
    with torch.inference_mode():
        born = Linear(24, 40)
        born.pack()
        assert torch.allclose(born(x), x @ born.weight.T, atol=1e-5)


def test_training_sees_the_weight_itself() -> None:
    linear, x = Linear(24, 40), torch.randn(5, 24)
    linear.pack()
    linear(x).sum().backward()
    assert linear.weight.grad is not None and torch.allclose(linear.weight.grad[0], x.sum(dim=0), atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_parts_add_up_to_the_whole(packed: bool) -> None:
    linear, pieces = Linear(24, 40, parts=3), torch.randn(3, 5, 8)
    if packed:
        linear.pack()
    with torch.no_grad():
        whole = linear(torch.cat(list(pieces), dim=-1))
        summed = torch.stack([linear.part(i, piece) for i, piece in enumerate(pieces)]).sum(dim=0)
    assert torch.allclose(whole, summed, atol=1e-5)


def test_counts_the_bytes_it_reads() -> None:
    linear = Linear(32, 48)
    with torch.no_grad():
        linear.weight.copy_(linear.weight.bfloat16())
    assert linear.num_bytes == 4 * 32 * 48
    linear.pack()
    assert linear.num_bytes == 2 * 32 * 48

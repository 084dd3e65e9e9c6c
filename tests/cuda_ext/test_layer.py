"""The halves of a decoder layer: the native call is its parts, bit for bit, and checks what it is given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specblock.cuda_ext.layer import (
    AttentionWeights,
    RestWeights,
    attention_inputs,
    attention_inputs_reference,
    layer_rest,
    layer_rest_reference,
)
from specblock.cuda_ext.linear import PackedWeight, pack
from specblock.cuda_ext.native import native_available

pytestmark = pytest.mark.skipif(not native_available(), reason="native operations were not built")


def packed(outputs: int, inputs: int, *, narrow: bool, coarse: bool) -> PackedWeight:
    full = torch.randn(outputs, inputs) / inputs**0.5
    return pack(full.to(torch.bfloat16).float() if narrow else full, coarse)


@given(
    seed=st.integers(0, 10**6), batch=st.integers(1, 3), rows=st.integers(1, 9), shared=st.booleans(),
    head_norms=st.booleans(), kind=st.fixed_dictionaries({"narrow": st.booleans(), "coarse": st.booleans()}),
    size=st.sampled_from([16, 32]), hidden=st.sampled_from([48, 64]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_both_halves_are_their_parts_bit_for_bit(
    seed: int, batch: int, rows: int, shared: bool, head_norms: bool, kind: dict[str, bool], size: int, hidden: int
) -> None:
    torch.manual_seed(seed)
    heads, key_heads, inner = 4, 2, 40
    norms = (torch.rand(size) + 0.5, torch.rand(size) + 0.5) if head_norms else (None, None)
    before = AttentionWeights(
        norm=torch.rand(hidden) + 0.5, eps=1e-5, query=packed(heads * size, hidden, **kind),
        key=packed(key_heads * size, hidden, **kind), value=packed(key_heads * size, hidden, **kind),
        query_norm=norms[0], key_norm=norms[1], head_eps=1e-6,
    )  # fmt: skip
    after = RestWeights(
        output=packed(hidden, heads * size, **kind), norm=torch.rand(hidden) + 0.5, eps=1e-5,
        gate=packed(inner, hidden, **kind), up=packed(inner, hidden, **kind),
        down=packed(hidden, inner, **kind),
    )  # fmt: skip
    x, mixed = torch.randn(batch, rows, hidden), torch.randn(batch, rows, heads * size)
    angle = torch.randn(1 if shared else batch, rows, size)
    rotary = (angle.cos(), angle.sin())
    with torch.inference_mode():
        got, wanted = attention_inputs(x, before, rotary), attention_inputs_reference(x, before, rotary)
        for own, other in zip(got, wanted, strict=True):
            assert own.shape == other.shape and torch.equal(own, other)
        assert torch.equal(layer_rest(x, mixed, after), layer_rest_reference(x, mixed, after))


def test_what_does_not_fit_is_refused() -> None:
    narrow, wide = (packed(*size, narrow=True, coarse=False).panels for size in ((32, 48), (48, 32)))
    table, norm, x = torch.zeros(1, 2, 16), torch.ones(48), torch.zeros(1, 2, 48)
    fits = [x, norm, 1e-5, narrow, narrow, narrow, 32, 32, table, table, None, None, 0.0]
    torch.ops.specblock.attention_inputs(*fits)
    for place, wrong in (
        (0, torch.zeros(2, 48)), (0, torch.zeros(1, 2, 40)), (1, torch.ones(40)), (3, wide), (6, 64), (7, 20),
        (8, torch.zeros(2, 2, 16)), (8, torch.zeros(1, 3, 16)), (9, torch.zeros(1, 2, 16).double()),
        (10, torch.ones(15)),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            torch.ops.specblock.attention_inputs(*fits[:place], wrong, *fits[place + 1 :])
    rest = [x, torch.zeros(1, 2, 32), wide, norm, 1e-5, narrow, narrow, wide, 32]
    torch.ops.specblock.layer_rest(*rest)
    for place, wrong in (
        (0, torch.zeros(1, 3, 48)), (1, torch.zeros(1, 2, 31)), (2, narrow), (3, torch.ones(47)), (5, wide),
        (7, narrow), (8, 64),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            torch.ops.specblock.layer_rest(*rest[:place], wrong, *rest[place + 1 :])

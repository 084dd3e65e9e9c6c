from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specblock.cuda_ext.attention import masked_attention, slot_attention, tree_attention
from specblock.cuda_ext.native import native_available
from specblock.cuda_ext.norm import rms_norm

pytestmark = pytest.mark.skipif(not native_available(), reason="native operations were not built")


def native(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    result: Tensor = torch.ops.specblock.tree_attention(query, key, value, mask, query.shape[-1] ** -0.5)
    return result


def rows(batch: int, groups: int, kv_heads: int, new: int, keys: int, size: int, seed: int) -> tuple[Tensor, ...]:
    """Query, keys and values as views into larger storages full of NaN, and a mask with one visible key per row."""
    generator = torch.Generator().manual_seed(seed)
    storage = torch.full((2, batch, kv_heads, keys + 7, size), torch.nan)
    storage[:, :, :, :keys] = torch.randn(2, batch, kv_heads, keys, size, generator=generator)
    query = torch.randn(batch, new, groups * kv_heads, size, generator=generator).transpose(1, 2)
    mask = torch.rand(batch, new, keys, generator=generator) < 0.6
    mask[:, :, int(torch.randint(keys, (1,), generator=generator))] = True
    return query, storage[0, :, :, :keys], storage[1, :, :, :keys], mask


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    new=st.integers(1, 40),
    keys=st.integers(1, 90),
    size=st.sampled_from([16, 48, 64, 128]),
    seed=st.integers(0, 2**31),
)
def test_the_native_attention_is_attention(
    batch: int, groups: int, kv_heads: int, new: int, keys: int, size: int, seed: int
) -> None:
    query, key, value, mask = rows(batch, groups, kv_heads, new, keys, size, seed)
    expected = masked_attention(query.double(), key.double(), value.double(), mask, size**-0.5)
    result = native(query, key, value, mask)
    assert result.shape == expected.shape
    assert torch.allclose(result.double(), expected, atol=3e-6, rtol=1e-5)


def test_a_row_has_the_same_bits_alone_in_its_tree_and_behind_padding() -> None:
    query, key, value, mask = rows(2, 2, 2, 30, 60, 64, 1)
    together = native(query, key, value, mask)
    for row in range(30):
        alone = native(query[:1, :, row : row + 1], key[:1], value[:1], mask[:1, row : row + 1])
        assert torch.equal(alone, together[:1, row : row + 1])
    fewer = mask.clone()
    fewer[:, :, 50:] = False
    assert torch.equal(
        native(query, key, value, fewer), native(query, key[:, :, :50], value[:, :, :50], mask[..., :50])
    )


def test_slots_give_the_bits_of_gathered_keys() -> None:
    query, key, value, _ = rows(3, 2, 2, 12, 60, 64, 4)
    key, value = key.nan_to_num(), value.nan_to_num()
    slots, lengths = torch.tensor([2, 0, 1]), torch.tensor([48, 0, 30])
    visible = torch.ones(3, 12, 12, dtype=torch.bool).tril()
    place = torch.arange(60) - lengths[:, None]
    mask = (place < 0)[:, None] | (place[:, None] >= 0) & (place[:, None] <= torch.arange(12)[:, None])
    with torch.no_grad():
        gathered = tree_attention(query, key[slots], value[slots], mask)
        assert torch.equal(slot_attention(query, key, value, slots, lengths, visible), gathered)


def test_extreme_scores_stay_finite() -> None:
    query, key, value, mask = rows(1, 2, 2, 9, 40, 64, 2)
    result = native(query * 300, key * 300, value, mask)
    expected = masked_attention(query.double() * 300, key.double() * 300, value.double(), mask, 64**-0.5)
    assert torch.allclose(result.double(), expected, atol=2e-2)  # scores of 1e6 have lost the digits behind the point
    assert native(torch.zeros_like(query), key, value, mask).isfinite().all()


def test_refuses_what_does_not_fit() -> None:
    query, key, value, mask = rows(1, 2, 2, 3, 8, 64, 3)
    for arguments, message in (
        ((query.double(), key, value, mask), "float32"),
        ((query[..., :40], key[..., :40], value[..., :40], mask), "multiple of 16"),
        ((query[:, :3], key, value, mask), "key does not fit"),
        ((query, key, value[:, :, :7], mask), "value does not fit"),
        ((query, key, value, mask[:, :2]), "mask does not fit"),
        ((query, key, value, mask.float()), "mask must be bool"),
        ((query.transpose(2, 3).contiguous().transpose(2, 3), key, value, mask), "contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            native(*arguments)


def test_chooses_the_reference_where_the_native_one_does_not_serve() -> None:
    query, key, value, mask = rows(1, 2, 2, 3, 8, 64, 3)
    with torch.no_grad():
        assert torch.equal(tree_attention(query, key, value, mask), native(query, key, value, mask))
    assert torch.allclose(tree_attention(query, key, value, mask), native(query, key, value, mask), atol=1e-6)
    double = tree_attention(query.double(), key.double(), value.double(), mask)
    assert double.dtype == torch.float64


def test_are_proper_operators() -> None:
    query, key, value, mask = rows(1, 2, 2, 3, 8, 64, 3)
    torch.library.opcheck(
        torch.ops.specblock.tree_attention.default, (query, key.contiguous(), value.contiguous(), mask, 0.1)
    )
    torch.library.opcheck(torch.ops.specblock.rms_norm.default, (torch.randn(3, 20), torch.randn(20), 1e-6))


@settings(max_examples=80, deadline=None)
@given(
    num_rows=st.integers(0, 20),
    size=st.integers(1, 200),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0, 1e-4, 1, 1e4]),
)
def test_the_native_norm_is_the_norm(num_rows: int, size: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, size, generator=generator) * scale
    weight = torch.randn(size, generator=generator)
    with torch.no_grad():
        result = rms_norm(x, weight, 1e-6)
    assert torch.allclose(result.double(), rms_norm(x.double(), weight.double(), 1e-6), atol=1e-6, rtol=1e-5)
    if num_rows:
        with torch.no_grad():
            assert torch.equal(rms_norm(x[-1:], weight, 1e-6), result[-1:])

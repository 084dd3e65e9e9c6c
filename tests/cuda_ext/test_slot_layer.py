"""A whole decoder layer over a cache: the native call is its parts, writes what they write, and checks its input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specblock.cuda_ext.layer import AttentionWeights, RestWeights
from specblock.cuda_ext.linear import PackedWeight, pack
from specblock.cuda_ext.native import native_available
from specblock.cuda_ext.slot_layer import CacheRows, LayerStack, slot_layer, slot_layer_reference

pytestmark = pytest.mark.skipif(not native_available(), reason="native operations were not built")
HEADS, KEY_HEADS, INNER, CAPACITY = 4, 2, 40, 40


def weights(hidden: int, inputs: int, size: int, *, norm: bool, head_norms: bool, coarse: bool = False) -> Any:
    def packed(outputs: int, inputs: int) -> PackedWeight:
        return pack((torch.randn(outputs, inputs) / inputs**0.5).to(torch.bfloat16).float(), coarse)

    own = (torch.rand(size) + 0.5, torch.rand(size) + 0.5) if head_norms else (None, None)
    before = AttentionWeights(
        norm=torch.rand(inputs) + 0.5 if norm else None, eps=1e-5, query=packed(HEADS * size, inputs),
        key=packed(KEY_HEADS * size, inputs), value=packed(KEY_HEADS * size, inputs), query_norm=own[0],
        key_norm=own[1], head_eps=1e-6,
    )  # fmt: skip
    after = RestWeights(
        output=packed(hidden, HEADS * size), norm=torch.rand(hidden) + 0.5, eps=1e-5, gate=packed(INNER, hidden),
        up=packed(INNER, hidden), down=packed(hidden, INNER),
    )  # fmt: skip
    return before, after


def cache_rows(batch: int, count: int, width: int, size: int, seed: int) -> CacheRows:
    slots = torch.randperm(batch + 2)[:batch]
    lengths = torch.randint(0, CAPACITY - width + 1, (batch,))
    keys, values = torch.randn(2, batch + 2, KEY_HEADS, CAPACITY, size)
    visible = torch.rand(batch, count, width) < 0.5
    visible |= torch.eye(width, dtype=torch.bool)[width - count :]
    return CacheRows(keys, values, slots, lengths, visible)


def copied(rows: CacheRows) -> CacheRows:
    return CacheRows(rows.keys.clone(), rows.values.clone(), rows.slots, rows.lengths, rows.visible)


@given(
    seed=st.integers(0, 10**6), batch=st.integers(1, 4), count=st.integers(1, 9), more=st.integers(0, 6),
    shared=st.booleans(), head_norms=st.booleans(), residual=st.booleans(), asked=st.integers(0, 4),
    size=st.sampled_from([16, 32]), hidden=st.sampled_from([48, 64]), coarse=st.booleans(),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_the_layer_is_its_parts(
    seed: int, batch: int, count: int, more: int, shared: bool, head_norms: bool, residual: bool, asked: int, size: int,
    hidden: int, coarse: bool,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    inputs = 2 * hidden if residual else hidden
    before, after = weights(hidden, inputs, size, norm=not residual, head_norms=head_norms, coarse=coarse)
    rows = cache_rows(batch, count, count + more, size, seed)
    again = copied(rows)
    x, angle = torch.randn(batch, count, inputs), torch.randn(1 if shared else batch, count, size)
    options = {
        "scale": 0.2,
        "residual": torch.randn(batch, count, hidden) if residual else None,
        "asking": torch.randint(0, count, (batch, asked)) if asked else None,
    }
    with torch.inference_mode():
        got = slot_layer(x, before, after, (angle.cos(), angle.sin()), rows, **options)
        wanted = slot_layer_reference(x, before, after, (angle.cos(), angle.sin()), again, **options)
    assert got.shape == (batch, asked or count, hidden)
    # The attention of the two rounds differently, and what lies between two bfloat16 numbers goes either way.
    tolerance = {"rtol": 0.02, "atol": 0.02} if coarse else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got, wanted, **tolerance)
    assert torch.equal(rows.keys, again.keys) and torch.equal(rows.values, again.values)


@given(
    seed=st.integers(0, 10**6), batch=st.integers(1, 4), count=st.integers(1, 9), num_layers=st.integers(1, 3),
    head_norms=st.booleans(), coarse=st.booleans(), kept=st.lists(st.integers(0, 2), max_size=3),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_stack_is_its_layers_bit_for_bit(
    seed: int, batch: int, count: int, num_layers: int, head_norms: bool, coarse: bool, kept: list[int]
) -> None:
    torch.manual_seed(seed)
    layers = [weights(64, 64, 32, norm=True, head_norms=head_norms, coarse=coarse) for _ in range(num_layers)]
    # Numbers that are no tensors are one layer's for all; so must these be.
    assert LayerStack.fits(layers)
    stack, kept = LayerStack(layers, 0.2), [layer for layer in kept if layer < num_layers] or [0]
    one = cache_rows(batch, count, count, 32, seed)
    keys, values = torch.randn(2, num_layers, *one.keys.shape)
    both = [CacheRows(keys.clone(), values.clone(), one.slots, one.lengths, one.visible) for _ in range(2)]
    x, angle = torch.randn(batch, count, 64), torch.randn(batch, count, 32)
    rotary = (angle.cos(), angle.sin())
    with torch.inference_mode():
        got, wanted = stack(x, rotary, both[0], kept), stack.reference(x, rotary, both[1], kept)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    assert torch.equal(both[0].keys, both[1].keys) and torch.equal(both[0].values, both[1].values)


@given(
    seed=st.integers(0, 10**6), batch=st.integers(1, 4), positions=st.integers(1, 3), width=st.integers(1, 4),
    num_layers=st.integers(1, 3), asked=st.integers(0, 4), coarse=st.booleans(), shifted=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_stack_with_shifts_of_which_some_rows_ask(
    seed: int, batch: int, positions: int, width: int, num_layers: int, asked: int, coarse: bool, shifted: bool
) -> None:
    torch.manual_seed(seed)
    layers = [weights(64, 64, 32, norm=True, head_norms=False, coarse=coarse) for _ in range(num_layers)]
    shifts = [pack(torch.randn(64, 128).bfloat16().float() / 8, coarse) for _ in layers[1:]] if shifted else []
    stack, count = LayerStack(layers, None, shifts, width), positions * width
    one = cache_rows(batch, count, count, 32, seed)
    keys, values = torch.randn(2, num_layers, *one.keys.shape)
    both = [CacheRows(keys.clone(), values.clone(), one.slots, one.lengths, one.visible) for _ in range(2)]
    x, angle = torch.randn(batch, count, 64), torch.randn(batch, count, 32)
    rotary, asking = (angle.cos(), angle.sin()), torch.randint(0, count, (batch, asked)) if asked else None
    with torch.inference_mode():
        got, wanted = (
            call(x, rotary, rows, asking=asking)[0] for call, rows in zip((stack, stack.reference), both, strict=True)
        )
    assert got.shape == (batch, asked or count, 64) and torch.equal(got, wanted)
    assert torch.equal(both[0].keys, both[1].keys) and torch.equal(both[0].values, both[1].values)


def test_shifts_that_do_not_fit_are_refused() -> None:
    torch.manual_seed(7)
    layers = [weights(64, 64, 32, norm=True, head_norms=False) for _ in range(2)]
    one = cache_rows(1, 4, 4, 32, 7)
    keys, values = torch.zeros(2, 2, *one.keys.shape)
    rows = CacheRows(keys, values, one.slots, one.lengths, one.visible)
    x, rotary = torch.randn(1, 4, 64), (torch.ones(1, 4, 32), torch.zeros(1, 4, 32))
    good, narrow = pack(torch.randn(64, 128)), pack(torch.randn(64, 64))
    with torch.inference_mode():
        for shifts, width, asking in (([good, good], 2, None), ([narrow], 2, None), ([good], 3, None),
                                      ([good], 2, torch.tensor([[4]]))):  # fmt: skip
            with pytest.raises(RuntimeError):
                LayerStack(layers, None, shifts, width)(x, rotary, rows, asking=asking)
        with pytest.raises(RuntimeError, match="ask or layers are kept"):
            LayerStack(layers)(x, rotary, rows, [0], torch.tensor([[1]]))
    assert not keys.any() and not values.any()


def test_a_row_sees_itself_whatever_it_is_told() -> None:
    torch.manual_seed(8)
    before, after = weights(64, 64, 32, norm=True, head_norms=False)
    rows = cache_rows(2, 3, 4, 32, 8)
    hidden = torch.zeros_like(rows.visible)
    itself = torch.eye(4, dtype=torch.bool)[1:].expand_as(hidden).contiguous()
    x, rotary = torch.randn(2, 3, 64), (torch.ones(1, 3, 32), torch.zeros(1, 3, 32))
    with torch.inference_mode():
        got, wanted = (
            slot_layer(x, before, after, rotary, replace(copied(rows), visible=seen)) for seen in (hidden, itself)
        )
    assert torch.equal(got, wanted)


def test_a_stack_refuses_layers_and_caches_that_do_not_fit() -> None:
    torch.manual_seed(6)
    layers = [weights(64, 64, 32, norm=True, head_norms=False) for _ in range(2)]
    assert not LayerStack.fits([layers[0], weights(64, 64, 32, norm=True, head_norms=True)])
    assert not LayerStack.fits([weights(64, 64, 32, norm=False, head_norms=False)])
    assert not LayerStack.fits([layers[0], (replace(layers[0][0], eps=1e-6), layers[0][1])])
    stack, one = LayerStack(layers, 0.2), cache_rows(1, 3, 3, 32, 6)
    keys, values = torch.zeros(2, 3, *one.keys.shape)
    x, angle = torch.randn(1, 3, 64), torch.randn(1, 3, 32)
    rotary = (angle.cos(), angle.sin())
    with torch.inference_mode():
        for layer_count, kept, lengths in ((3, [0], one.lengths), (2, [2], one.lengths), (2, [0], one.lengths + 100)):
            rows = CacheRows(keys[:layer_count], values[:layer_count], one.slots, lengths, one.visible)
            with pytest.raises(RuntimeError):
                stack(x, rotary, rows, kept)
        # Of the last layer only: what was checked before it may not have been written.
        spoiled = replace(layers[1][1], down=layers[1][1].up)
        rows = CacheRows(keys[:2], values[:2], one.slots, one.lengths, one.visible)
        with pytest.raises(RuntimeError):
            LayerStack([layers[0], (layers[1][0], spoiled)], 0.2)(x, rotary, rows, [0])
    assert not keys.any() and not values.any()


@pytest.mark.parametrize("coarse", [False, True])
def test_a_row_has_the_same_bits_alone_and_among_others(coarse: bool) -> None:
    torch.manual_seed(3)
    before, after = weights(64, 64, 32, norm=True, head_norms=True, coarse=coarse)
    rows = cache_rows(4, 5, 5, 32, 3)
    x, angle = torch.randn(4, 5, 64), torch.randn(4, 5, 32)
    with torch.inference_mode():
        together = slot_layer(x, before, after, (angle.cos(), angle.sin()), copied(rows))
        for b in range(4):
            one = CacheRows(
                rows.keys, rows.values, rows.slots[b : b + 1], rows.lengths[b : b + 1], rows.visible[b:][:1]
            )
            table = (angle.cos()[b : b + 1], angle.sin()[b : b + 1])
            alone = slot_layer(x[b : b + 1], before, after, table, one)
            assert torch.equal(alone[0], together[b])
            asked = slot_layer(x[b : b + 1], before, after, table, one, asking=torch.tensor([[4, 1]]))
            assert torch.equal(asked[0], together[b, [4, 1]])


def test_what_hidden_and_stale_rows_hold_changes_nothing() -> None:
    torch.manual_seed(4)
    before, after = weights(64, 64, 32, norm=True, head_norms=False)
    clean = cache_rows(2, 3, 6, 32, 4)
    dirty = copied(clean)
    for b in range(2):
        slot, length = int(clean.slots[b]), int(clean.lengths[b])
        unseen = [length + 3 + row for row in range(-3, 0) if not clean.visible[b, :, row + 3].any()]
        dirty.keys[slot, :, length + 6 :], dirty.values[slot, :, length + 6 :] = float("nan"), float("nan")
        dirty.keys[slot, :, unseen], dirty.values[slot, :, unseen] = 1e6, -1e6
    x, angle = torch.randn(2, 3, 64), torch.randn(1, 3, 32)
    with torch.inference_mode():
        results = [slot_layer(x, before, after, (angle.cos(), angle.sin()), rows) for rows in (clean, dirty)]
    assert torch.equal(*results)


def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    torch.manual_seed(5)
    before, after = weights(64, 64, 32, norm=True, head_norms=False)
    b, a, rows = before, after, cache_rows(2, 3, 4, 32, 5)
    table = torch.ones(1, 3, 32)
    fits = [
        torch.ones(2, 3, 64), None, b.norm, b.eps, b.query.panels, b.key.panels, b.value.panels, 128, 64, table, table,
        None, None, 0.0, rows.keys, rows.values, rows.slots, rows.lengths, rows.visible, None, 0.2, a.output.panels,
        a.norm, a.eps, a.gate.panels, a.up.panels, a.down.panels, INNER,
    ]  # fmt: skip
    before_keys = rows.keys.clone()
    for place, wrong in (
        (0, torch.ones(2, 64)),
        (0, torch.ones(2, 3, 48)), (0, torch.ones(2, 3, 64).double()), (1, torch.ones(2, 2, 64)),
        (2, torch.ones(63)), (4, b.key.panels), (7, 96), (8, 32), (9, torch.ones(1, 2, 32)), (11, torch.ones(31)),
        (14, rows.keys[:, :1]), (14, rows.keys.double()), (15, rows.values[..., :16]), (16, torch.tensor([0, 9])),
        (16, torch.tensor([-1, 0])), (17, torch.tensor([0, CAPACITY - 3])), (17, torch.tensor([-1, 0])),
        (18, rows.visible[:, :, :2].contiguous()), (18, rows.visible.int()), (19, torch.tensor([[0], [3]])),
        (19, torch.tensor([[0]])), (21, b.query.panels), (22, torch.ones(5)), (24, b.key.panels), (27, 64),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            torch.ops.specblock.slot_layer(*fits[:place], wrong, *fits[place + 1 :])
    assert torch.equal(rows.keys, before_keys)
    torch.ops.specblock.slot_layer(*fits)
    assert not torch.equal(rows.keys, before_keys)


def test_a_fake_call_has_the_shape() -> None:
    torch.manual_seed(6)
    before, after = weights(64, 64, 32, norm=True, head_norms=False)
    rows, table = cache_rows(2, 3, 4, 32, 6), torch.ones(1, 3, 32)
    x = torch.ones(2, 3, 64)
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.inference_mode():
        fake = mode.from_tensor(x)
        assert slot_layer(fake, before, after, (table, table), rows).shape == (2, 3, 64)
        asked = slot_layer(fake, before, after, (table, table), rows, asking=torch.zeros(2, 1, dtype=torch.int64))
        assert asked.shape == (2, 1, 64)
        stacked = CacheRows(rows.keys[None], rows.values[None], rows.slots, rows.lengths, rows.visible)
        last, kept = LayerStack([(before, after)], 0.2)(fake, (table, table), stacked, [0, 0])
        assert last.shape == (2, 3, 64) and kept.shape == (2, 3, 128)

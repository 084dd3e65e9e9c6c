from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from specblock.cuda_ext.linear import PackedLinear, can_pack, pack, pack_linears, rounds_rows, swiglu
from specblock.cuda_ext.native import native_available
from specblock.cuda_ext.norm import reference_norm

needs_native = pytest.mark.skipif(not native_available(), reason="native operations were not built")


def matrix(outputs: int, inputs: int, seed: int, exact: bool) -> torch.Tensor:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    return weight.bfloat16().float() if exact else weight


@needs_native
@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(0, 40),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 100),
    seed=st.integers(0, 2**31),
    exact=st.booleans(),
)
def test_the_native_product_is_the_product(rows: int, inputs: int, outputs: int, seed: int, exact: bool) -> None:
    weight = matrix(outputs, inputs, seed, exact)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed + 1))
    result = pack(weight)(x)
    assert result.shape == (rows, outputs) and result.dtype == torch.float32
    # Against float64, within what float32 sums of this length may lose.
    bound = 1e-6 * (x.abs().double() @ weight.abs().double().T) + 1e-12
    assert ((result.double() - x.double() @ weight.double().T).abs() <= bound).all()


@needs_native
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("outputs", "inputs"), [(1000, 300), (200, 1408), (120, 9000)])
def test_a_row_has_the_same_bits_alone_and_among_others(outputs: int, inputs: int, exact: bool) -> None:
    """Also where few panels of weights fit into a cache together."""
    packed = pack(matrix(outputs, inputs, 3, exact))
    x = torch.randn(40, inputs)
    together = packed(x)
    for rows in range(1, 41):
        assert torch.equal(packed(x[:rows]), together[:rows]), rows
        assert torch.equal(packed(x[-rows:]), together[-rows:]), rows


@needs_native
def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    packed, x, before = pack(matrix(4096, 512, 3, True)), torch.randn(9, 512), torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(packed(x))
    torch.set_num_threads(before)
    assert torch.equal(*results)


@needs_native
@pytest.mark.parametrize("exact", [True, False])
def test_halves_the_bytes_only_where_nothing_is_lost(exact: bool) -> None:
    weight = matrix(37, 20, 1, exact)
    packed = pack(weight)
    assert packed.panels.dtype == (torch.bfloat16 if exact else torch.float32)
    assert torch.equal(packed.unpacked(), weight)


@needs_native
def test_poisoned_neighbours_do_not_reach_the_result() -> None:
    storage = torch.full((60, 20), torch.nan)
    storage[10:20] = torch.randn(10, 20)
    packed = pack(matrix(33, 20, 1, True))
    assert torch.equal(packed(storage[10:20]), packed(storage[10:20].clone()))
    assert packed(storage[10:20]).isfinite().all()


@needs_native
def test_refuses_what_does_not_fit() -> None:
    packed = pack(matrix(33, 20, 1, True))
    for x, panels, outputs, message in (
        (torch.ones(2, 21), packed.panels, 33, "does not fit x"),
        (torch.ones(2, 20), packed.panels, 49, "out_features"),
        (torch.ones(2, 0), packed.panels[:, :0], 33, "no inputs"),
        (torch.ones(2, 20), packed.panels, 32, "out_features"),
        (torch.ones(2, 20, dtype=torch.float64), packed.panels, 33, "float32"),
        (torch.ones(20, 2).T, packed.panels, 33, "contiguous"),
        (torch.ones(2, 20), packed.panels.double(), 33, "bfloat16 or float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.specblock.packed_linear(x, panels, outputs)


@needs_native
def test_is_a_proper_operator() -> None:
    packed = pack(matrix(33, 20, 1, True))
    arguments = (torch.ones(2, 20), packed.panels, 33)
    torch.library.opcheck(torch.ops.specblock.packed_linear.default, arguments)


@needs_native
def test_replaces_linear_layers_with_and_without_bias() -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.SiLU(), nn.Sequential(nn.Linear(30, 10, bias=False)), nn.Linear(10, 5))
    model[3].double()  # stays: not float32
    x = torch.randn(3, 4, 20)
    expected = model[:3](x)
    assert pack_linears(model) == 2
    assert isinstance(model[0], PackedLinear) and type(model[3]) is nn.Linear
    assert torch.allclose(model[:3](x), expected, atol=1e-5)


def test_other_types_are_left_alone() -> None:
    assert not can_pack(torch.zeros(2, 2, dtype=torch.bfloat16))
    assert not can_pack(torch.zeros(2, 2, dtype=torch.float64))


def test_a_missing_or_broken_library_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    with caplog.at_level(logging.WARNING, "specblock.cuda_ext.native"):
        for path in (tmp_path / "none.so", broken):
            assert not native_available(path)
            assert not native_available(path)
    assert [("not built" in m, "cannot be loaded" in m) for m in caplog.messages] == [(True, False), (False, True)]


@needs_native
@pytest.mark.parametrize("seed", range(12))
def test_swiglu_and_heads_are_what_they_say(seed):
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, size = 32, 17 + 7 * seed, 16
    gate, up = torch.randn(2, inner, hidden, generator=generator)
    down, heads = torch.randn(hidden, inner, generator=generator), torch.randn(3 * size, hidden, generator=generator)
    x = torch.randn(2, 1 + seed % 5, hidden, generator=generator)
    mixed = torch.nn.functional.silu(x @ gate.T) * (x @ up.T) @ down.T
    assert torch.allclose(swiglu(x, pack(gate), pack(up), pack(down)), mixed, rtol=1e-4, atol=1e-3)
    angle = torch.rand(2, x.shape[1], size // 2, generator=generator) * 6
    rotary = (torch.cat([angle, angle], dim=-1).cos(), torch.cat([angle, angle], dim=-1).sin())
    weight = torch.rand(size, generator=generator)
    for norm in (None, weight):
        plain = (x @ heads.T).view(2, -1, 3, size)
        plain = plain if norm is None else reference_norm(plain, norm, 1e-6)
        left, right = plain.chunk(2, dim=-1)
        expected = plain * rotary[0][:, :, None] + torch.cat([-right, left], dim=-1) * rotary[1][:, :, None]
        found = pack(heads).heads(x, rotary, norm, 1e-6)
        assert torch.allclose(found, expected.transpose(1, 2), rtol=1e-4, atol=1e-4)


@needs_native
def test_a_row_of_swiglu_and_heads_has_the_same_bits_alone():
    gate, up, down, heads = torch.randn(21, 16), torch.randn(21, 16), torch.randn(16, 21), torch.randn(32, 16)
    packed = [pack(w) for w in (gate, up, down)]
    x, table = torch.randn(1, 9, 16), torch.rand(2, 1, 9, 16)
    together, rotated = swiglu(x, *packed), pack(heads).heads(x, (table[0], table[1]))
    for row in range(9):
        one = slice(row, row + 1)
        assert torch.equal(swiglu(x[:, one], *packed), together[:, one])
        assert torch.equal(pack(heads).heads(x[:, one], (table[0][:, one], table[1][:, one])), rotated[:, :, one])


@needs_native
def test_heads_that_do_not_fit_are_refused():
    packed, table = pack(torch.randn(32, 16)), torch.zeros(1, 2, 24)
    with pytest.raises(RuntimeError, match="heads do not fit"):
        packed.heads(torch.zeros(1, 2, 16), (table, table))


@needs_native
@pytest.mark.parametrize("exact", [True, False])
def test_what_is_no_number_stays_so(exact: bool) -> None:
    weight = matrix(20, 40, 5, exact)
    x = torch.randn(5, 40)
    x[0, 3], x[1, 39], x[2, 7], x[3, 0] = torch.inf, -torch.inf, torch.nan, torch.finfo(torch.float32).max
    result, expected = pack(weight)(x), x.double() @ weight.double().T
    finite = expected.float().isfinite()
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result[~finite & ~expected.isnan()], expected[~finite & ~expected.isnan()].float())
    torch.testing.assert_close(result[finite].double(), expected[finite], rtol=1e-5, atol=1e-4)


@needs_native
def test_parts_of_every_size_add_up() -> None:
    """Values over the whole range of float32, each alone in its row: nothing of its 24 bits may be lost."""
    weight = torch.ones(16, 1)
    x = torch.logspace(-30, 38, 500, dtype=torch.float64).float()[:, None] * torch.tensor([[1.0], [-1.0]])[:, None]
    x = x.reshape(-1, 1)
    assert torch.equal(pack(weight)(x), x.expand(-1, 16))


@needs_native
@pytest.mark.parametrize("rows", [1, 7, 16, 33, 400])
def test_a_coarse_product_is_that_of_rounded_rows(rows: int) -> None:
    torch.manual_seed(rows)
    weight, x = torch.randn(40, 50).bfloat16().float(), torch.randn(rows, 50)
    x[0, :4] = torch.tensor([1e-3, -3e30, 0.0, 1.00390625])  # the last lies between two bfloat16 numbers
    packed, coarse = pack(weight), pack(weight, coarse=True)
    assert torch.equal(packed.panels, coarse.panels)
    rounded = x.bfloat16() if rounds_rows() else x
    wanted, size = rounded.double() @ weight.double().T, rounded.double().abs() @ weight.double().abs().T
    found = coarse(x)
    assert ((found - wanted).abs() <= 5e-6 * size).all()  # a rounded product is off by some 1e-3
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(coarse(x[row : row + 1])[0], found[row])
    x[rows // 2, 3] = float("nan")
    assert coarse(x)[rows // 2].isnan().all() and not coarse(x)[: rows // 2].isnan().any()


@needs_native
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 1), (17, 33), (5, 96), (208, 31)])
def test_coarse_products_of_odd_shapes(outputs: int, inputs: int) -> None:
    """Neither inputs without a neighbour nor panels that are not full read or write anything else."""
    torch.manual_seed(outputs)
    weight, x = torch.randn(outputs, inputs).bfloat16().float(), torch.randn(11, inputs).bfloat16().float()
    coarse = pack(weight, coarse=True)
    torch.testing.assert_close(coarse(x), x @ weight.T, rtol=1e-5, atol=1e-5)
    # What lies behind the last input of a panel is the first of the next one, or nobody's.
    store = torch.full((coarse.panels.numel() + 64,), float("nan"), dtype=torch.bfloat16)
    for panel, own in enumerate(coarse.panels):
        inside = store[: own.numel()].view_as(own).copy_(own)
        alone = replace(coarse, panels=inside[None], out_features=min(16, outputs - 16 * panel))
        assert torch.equal(alone(x), coarse(x)[:, 16 * panel : 16 * panel + 16])

"""Attention over the slots of a cache, on every device, against float64 row by row."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from specblock.cuda_ext.attention import slot_attention, slot_attention_reference
from specblock.cuda_ext.native import cuda_native_available, native_available

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Largest deviation of a head's row relative to its norm; bfloat16 rounds the probabilities and the result.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass(frozen=True, slots=True)
class Case:
    """Everything ``slot_attention`` is given; storage that no row may use is NaN."""

    query: Tensor
    key: Tensor
    value: Tensor
    slots: Tensor
    lengths: Tensor
    visible: Tensor

    def result(self) -> Tensor:
        with torch.inference_mode():
            return slot_attention(self.query, self.key, self.value, self.slots, self.lengths, self.visible)

    def only(self, request: int, rows: int | None = None) -> Case:
        """One request alone, with its first ``rows`` rows."""
        one = slice(request, request + 1)
        query, visible = self.query[one, :, :rows], self.visible[one, :rows, :rows].contiguous()
        return Case(query, self.key, self.value, self.slots[one], self.lengths[one], visible)


def ancestors(shape: str, batch: int, rows: int, generator: torch.Generator) -> Tensor:
    """bool [B, R, R]: which rows are on the path of each row, itself included."""
    seen = torch.eye(rows, dtype=torch.bool).repeat(batch, 1, 1)
    for b in range(batch):
        for r in range(1, rows):
            random = int(torch.randint(r, (1,), generator=generator))
            parent = {"chain": r - 1, "star": 0, "random": random}[shape]
            seen[b, r] |= seen[b, parent]
    return seen


def make(
    device: str, dtype: torch.dtype, *, lengths: list[int], rows: int, capacity: int, tree: str = "random",
    heads: tuple[int, int] = (8, 2), size: int = 64, seed: int = 0, spread: float = 1.0,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    batch, num_slots = len(lengths), len(lengths) + 2
    slots = torch.randperm(num_slots, generator=generator)[:batch]
    # One more token per row than the capacity: the storage is a view, as one layer of a larger cache is.
    storage = torch.full((2, num_slots, heads[1], capacity + 1, size), torch.nan)
    for slot, length in zip(slots.tolist(), lengths, strict=True):
        filled = length + rows
        storage[:, slot, :, :filled] = torch.randn(2, heads[1], filled, size, generator=generator)
    storage = storage.to(device=device, dtype=dtype)
    query = (torch.randn(batch, rows, heads[0], size, generator=generator) * spread).to(device=device, dtype=dtype)
    visible = ancestors(tree, batch, rows, generator).to(device)
    key, value = storage[0, :, :, :capacity], storage[1, :, :, :capacity]
    return Case(query.transpose(1, 2), key, value, slots.to(device), torch.tensor(lengths).to(device), visible)


def expected(case: Case) -> Tensor:
    """float64 [B, R, heads, D] on the CPU: every request from its own keys alone."""
    query, visible = case.query.double().cpu(), case.visible.cpu()
    batch, heads, rows, size = query.shape
    out = torch.empty(batch, rows, heads, size, dtype=torch.float64)
    for b in range(batch):
        end = int(case.lengths[b]) + rows
        key, value = (s[int(case.slots[b]), :, :end].double().cpu() for s in (case.key, case.value))
        grouped = query[b].view(key.shape[0], -1, rows, size)
        scores = torch.einsum("ghrd,gtd->ghrt", grouped, key) * size**-0.5
        mask = torch.cat([torch.ones(rows, end - rows, dtype=torch.bool), visible[b]], dim=1)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        out[b] = torch.einsum("ghrt,gtd->ghrd", weights, value).reshape(heads, rows, size).transpose(0, 1)
    return out


def check(case: Case) -> None:
    result = case.result()
    assert result.is_contiguous() and result.dtype == case.query.dtype
    wanted = expected(case)
    error = (result.double().cpu() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert float(error.max()) < TOLERANCE[result.dtype], f"relative error {float(error.max()):.2e}"


@pytest.mark.gpu
def test_the_kernel_is_there() -> None:
    assert native_available() and cuda_native_available("slot_attention")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("tree", "rows"), [("random", 1), ("chain", 5), ("star", 16), ("random", 32), ("random", 64)])
def test_is_attention_over_ragged_prefixes(device: str, dtype: torch.dtype, size: int, tree: str, rows: int) -> None:
    lengths = [0, 1, 63, 64, 300, 200 - rows, 513, 520]
    check(make(device, dtype, lengths=lengths, rows=rows, capacity=600, tree=tree, size=size, seed=rows))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "rows"), [((2, 2), 3), ((7, 1), 9), ((32, 8), 24), ((12, 4), 65)])
def test_every_grouping_of_heads(device: str, dtype: torch.dtype, heads: tuple[int, int], rows: int) -> None:
    check(make(device, dtype, lengths=[70, 5, 128], rows=rows, capacity=256, heads=heads, size=128))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 64])
def test_full_slots(device: str, dtype: torch.dtype, batch: int) -> None:
    lengths = [192 - 17 - i % 3 for i in range(batch)]
    check(make(device, dtype, lengths=lengths, rows=17, capacity=192, seed=batch))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_long_prefixes(device: str, dtype: torch.dtype, rows: int) -> None:
    check(make(device, dtype, lengths=[4000, 511, 2049], rows=rows, capacity=4096, size=128, spread=2.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 20, 40, 64])
def test_a_batch_that_fills_the_device(device: str, dtype: torch.dtype, rows: int) -> None:
    """As few splits as there are: one, for every size of a tile."""
    lengths = [(37 * i) % (320 - rows) for i in range(80)]
    check(make(device, dtype, lengths=lengths, rows=rows, capacity=320, heads=(12, 4), size=128))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_is_the_same_alone_and_among_others(dtype: torch.dtype) -> None:
    together = make("cuda", dtype, lengths=[40, 1100, 700, 0], rows=64, capacity=1300, tree="chain", size=128)
    result = together.result()
    for request in range(4):
        for rows in (None, 33, 9, 5, 1):  # every size of a tile
            alone = together.only(request, rows).result()[0]
            among = result[request, :rows]
            if dtype == torch.float32:
                assert torch.equal(alone, among)  # every bit
            error = (alone - among).float().norm(dim=-1) / among.float().norm(dim=-1)
            assert float(error.max()) < TOLERANCE[dtype]


@pytest.mark.gpu
def test_every_element_is_written_and_a_graph_can_replay_it() -> None:
    case = make("cuda", torch.bfloat16, lengths=[100, 7], rows=20, capacity=256, size=128)
    wanted = case.result()
    assert wanted.isfinite().all()
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        case.result()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = case.result()
        result.fill_(torch.nan)
        graph.replay()
        stream.synchronize()
        assert torch.equal(result, wanted)
        case.lengths.sub_(3)  # what is read on the device may change between replays
        graph.replay()
        stream.synchronize()
        assert torch.equal(result, case.result()) and not torch.equal(result, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [128, 1024])  # without splits, and with
def test_slots_and_lengths_out_of_range_give_nan_and_read_nothing(capacity: int) -> None:
    for slots, lengths in (([9, 0], [4, 4]), ([-1, 0], [4, 4]), ([1, 0], [-1, 4]), ([1, 0], [capacity - 3, 4])):
        case = make("cuda", torch.bfloat16, lengths=[4, 4], rows=4, capacity=capacity)
        case.slots.copy_(torch.tensor(slots))
        case.lengths.copy_(torch.tensor(lengths))
        assert case.result()[0].isnan().all()


@pytest.mark.gpu
def test_is_a_proper_operator_on_the_device_too() -> None:
    case = make("cuda", torch.bfloat16, lengths=[9, 0, 20], rows=6, capacity=32)
    inputs = (case.query, case.key.nan_to_num(), case.value.nan_to_num(), case.slots, case.lengths, case.visible, 0.125)
    torch.library.opcheck(torch.ops.specblock.slot_attention.default, inputs)
    with pytest.raises(RuntimeError, match="device of the other tensors"):
        torch.ops.specblock.slot_attention(*inputs[:3], case.slots.cpu(), *inputs[4:])
    with pytest.raises(RuntimeError, match="another type"):
        torch.ops.specblock.slot_attention(inputs[0], inputs[1].half(), *inputs[2:])


def test_the_native_operation_is_the_reference_and_a_proper_operator() -> None:
    if not native_available():
        pytest.skip("native operations were not built")
    case = make("cpu", torch.float32, lengths=[9, 0, 20], rows=6, capacity=32)
    inputs = (case.query, case.key, case.value, case.slots, case.lengths, case.visible, 0.125)
    native = torch.ops.specblock.slot_attention(*inputs)
    torch.testing.assert_close(native, slot_attention_reference(*inputs), rtol=1e-5, atol=1e-6)
    finite = (case.query, case.key.nan_to_num(), case.value.nan_to_num(), *inputs[3:])
    torch.library.opcheck(torch.ops.specblock.slot_attention.default, finite)
    for place, wrong, message in (
        (2, case.value[:, :1], "value does not fit"),
        (3, torch.tensor([5, 0, 1]), "out of range"),
        (4, torch.tensor([27, 0, 1]), "out of range"),
        (5, case.visible[:, :, :5].contiguous(), "visible does not fit"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.specblock.slot_attention(*inputs[:place], wrong, *inputs[place + 1 :])

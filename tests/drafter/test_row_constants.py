"""What is kept about rows is what would be computed, for small and large caches, and nobody writes to it."""

from __future__ import annotations

import copy

import pytest
import torch

from specblock.cuda_ext.native import native_available
from specblock.cuda_ext.rotary_tables import RotaryTables
from specblock.drafter.draft import BlockDrafter
from specblock.drafter.row_constants import causal, row_offsets
from tests.drafter.helpers import tiny_model
from tests.drafter.test_slots import cycles, pair

CPU = torch.device("cpu")


@pytest.mark.parametrize(("batch", "count"), [(1, 1), (2, 8), (1, 64), (3, 65)])
def test_masks_and_offsets_are_those_of_consecutive_positions(batch: int, count: int) -> None:
    assert torch.equal(causal(batch, count, CPU), torch.ones(batch, count, count, dtype=torch.bool).tril())
    network = tiny_model()
    width = network.config.num_slots
    positions = torch.arange(count).expand(batch, -1)
    assert torch.equal(row_offsets(count, width, CPU).expand(batch, -1), network.rotary_index(positions))


def test_tables_grow_with_the_caches_they_serve() -> None:
    network = tiny_model()
    tables = RotaryTables(network.rotary_tables)
    for positions in (4, 100, 10):  # a small cache first, as in an engine that measures before it serves
        index = torch.tensor([[0, 1, positions, 2 * positions + 60]])
        for found, wanted in zip(tables.of(index, 2 * positions + 64), network.rotary_tables(index), strict=True):
            torch.testing.assert_close(found[:, None], wanted)
    with pytest.raises(IndexError):
        RotaryTables(network.rotary_tables).of(torch.tensor([[10_000]]), 10)


@pytest.mark.skipif(not native_available(), reason="native operations were not built")
def test_a_copied_network_drafts_with_its_own_layers() -> None:
    masks, slots = pair("specblock", None, dtype=torch.float32, head_dim=16)
    cycles((masks, slots), noisy=True)
    copied = copy.deepcopy(masks.model)
    with torch.no_grad():
        for name, weight in copied.named_parameters():
            if name.startswith("layers."):
                weight.mul_(0.3)
    settings = masks.settings
    cycles((BlockDrafter(copied, settings, by_slot=False), BlockDrafter(copied, settings, by_slot=True)), noisy=True)


def test_what_is_kept_is_read_only_in_a_cycle() -> None:
    before = causal(1, 8, CPU).clone(), row_offsets(2, 4, CPU).clone()
    cycles(pair("specblock", None, dtype=torch.float32, head_dim=16), noisy=True, seed=3)
    assert torch.equal(causal(1, 8, CPU), before[0]) and torch.equal(row_offsets(2, 4, CPU), before[1])

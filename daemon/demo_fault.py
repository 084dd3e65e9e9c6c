"""A daemon with a planted fault, for the demo and its test: the drafter's cache has slipped by one position.

Started by ``python -m specblock.daemon.demo_fault_main serve -c FILE``; ``specblockd`` never reaches it.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from specblock.daemon.actors import EngineActor
from specblock.daemon.config import DaemonConfig
from specblock.daemon.models import draft_settings, load_network
from specblock.drafter.config import DraftSettings
from specblock.drafter.draft import BlockDrafter
from specblock.drafter.interface import NewPositions
from specblock.drafter.kv_cache import DrafterCache
from specblock.drafter.network import DraftNetwork
from specblock.verifier.model import TargetModel


class DesynchronisedDrafter(BlockDrafter):
    """A drafter whose cache has slipped by one position: it pairs each token with the features of the position before.

    Weights, tree, acceptance and the recorded windows are untouched, so only the comparison with exact replay tells.
    """

    def __init__(self, model: DraftNetwork, settings: DraftSettings) -> None:
        super().__init__(model, settings)
        self._last: dict[int, Tensor] = {}

    def paired(self, cache: DrafterCache, slots: list[int], new: NewPositions) -> NewPositions:
        """See BlockDrafter.paired."""
        late = new.features.roll(1, dims=1)
        for row, (slot, count) in enumerate(zip(slots, new.counts, strict=True)):
            late[row, 0] = self._last.get(slot, new.features[row, 0])
            if count:
                self._last[slot] = new.features[row, count - 1].clone()
        return NewPositions(late, new.tokens, new.counts)


class DesynchronisedEngineActor(EngineActor):
    """The engine actor around that drafter."""

    def load_drafter(self, config: DaemonConfig, target: TargetModel, weights: Path | None) -> BlockDrafter:
        """See EngineActor.load_drafter."""
        assert weights is not None, "the demo refuses drafters without weights"
        return DesynchronisedDrafter(load_network(target, weights), draft_settings(config))

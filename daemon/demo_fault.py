"""A daemon with a planted fault, for the demo and its test: cached drafter rows lie one position too late.

``python -m specblock.daemon.demo_fault serve -c FILE``; nothing of this is reachable from ``specblockd``.
"""

from __future__ import annotations

import os
from functools import partial

from torch import Tensor

from specblock.daemon import supervisor
from specblock.daemon.actors import EngineActor
from specblock.daemon.app import app
from specblock.daemon.config import DaemonConfig
from specblock.daemon.environment import prepare_environment
from specblock.daemon.models import draft_settings, load_version
from specblock.daemon.registry import DrafterRegistry
from specblock.drafter.draft import SpecBlockDrafter
from specblock.drafter.kv_cache import DrafterCache
from specblock.verifier.model import TargetModel


class DesynchronisedCache(DrafterCache):
    """Writes every row one position late, so that it answers for its neighbour."""

    def write(
        self, layer: int, slots: Tensor, in_order: bool, start: Tensor, keys: Tensor, values: Tensor, end: int
    ) -> tuple[Tensor, Tensor]:
        """See DrafterCache.write."""
        return super().write(layer, slots, in_order, start + self.slots_per_position, keys, values, end)


class DesynchronisedDrafter(SpecBlockDrafter):
    """A drafter with a broken cache; weights, tree and acceptance are untouched."""

    def new_cache(self, num_slots: int, capacity_positions: int) -> DrafterCache:
        """See SpecBlockDrafter.new_cache."""
        weight, config = self.model.lm_head.weight, self.model.config
        return DesynchronisedCache(
            config, num_slots, capacity_positions + 2, self.scratch_rows, weight.dtype, weight.device
        )


class DesynchronisedEngineActor(EngineActor):
    """The engine actor around that drafter."""

    def load_drafter(
        self, config: DaemonConfig, target: TargetModel, registry: DrafterRegistry, version: str
    ) -> SpecBlockDrafter:
        """See EngineActor.load_drafter."""
        return DesynchronisedDrafter(load_version(config, target, registry.path(version)), draft_settings(config))


def main() -> None:
    """The ordinary command line, with ``serve`` on the broken engine."""
    prepare_environment(os.environ)
    supervisor.serve = partial(supervisor.serve, engine_type=DesynchronisedEngineActor)  # type: ignore[assignment]
    app()


if __name__ == "__main__":
    # Ray must find the actor class by an importable name, not in __main__.
    from specblock.daemon.demo_fault import main as importable_main

    importable_main()

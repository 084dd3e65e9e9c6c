"""The drafter families: which network belongs to a configuration, and how each is trained."""

from __future__ import annotations

from torch import Tensor

from specblock.drafter.config import DrafterConfig
from specblock.drafter.eagle3 import Eagle3Model
from specblock.drafter.loss import LossSettings
from specblock.drafter.model import SpecBlockModel
from specblock.drafter.network import DraftNetwork
from specblock.drafter.parallel import ParallelModel

_NETWORKS: dict[str, type[DraftNetwork]] = {
    "specblock": SpecBlockModel,
    "eagle3": Eagle3Model,
    "parallel": ParallelModel,
}


def new_network(config: DrafterConfig, embedding: Tensor) -> DraftNetwork:
    """A network of ``config.kind`` with initial weights.

    Args:
        config: architecture.
        embedding: the target's input embedding [V, H].

    Raises:
        ValueError: the embedding is not of the configured size.
    """
    return _NETWORKS[config.kind](config, embedding)


def training_blocks(kind: str, wanted: int) -> int:
    """Blocks per training step: ``wanted`` for SpecBlock, 7 unrolled steps for EAGLE-3, one for parallel heads."""
    return {"specblock": wanted, "eagle3": 7, "parallel": 1}[kind]


def loss_settings(kind: str, prefix: str, later_share: float) -> LossSettings:
    """Loss weights of a kind: EAGLE-3 weighs step s with 0.8 ** s, the others slot k with 0.8 ** k."""
    block_decay = 0.8 if kind == "eagle3" else 1.0
    return LossSettings(prefix=prefix, later_share=later_share, block_decay=block_decay)

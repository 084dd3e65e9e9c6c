"""What the engine needs of a drafter, whichever it is. The engine does not know which one it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from specblock.cuda_ext.noise import NoiseWindow
from specblock.cuda_ext.sampling import SamplingBatch
from specblock.cuda_ext.tree import DraftTree, Offers
from specblock.drafter.config import DraftSettings
from specblock.drafter.plan import DraftPlan, Limits


@dataclass(frozen=True, slots=True)
class NewPositions:
    """What the last verification yields for the drafter: pairs (feature, the token that follows it).

    Attributes:
        features: [B, P, F], padded at the end.
        tokens: int64 [B, P].
        counts: number of real positions per request (may be 0).
    """

    features: Tensor
    tokens: Tensor
    counts: list[int]


@dataclass(frozen=True, slots=True)
class Draft:
    """A cycle's trees, the sizes they were grown with, an upper bound of their depth, and all that was proposed."""

    tree: DraftTree
    plan: DraftPlan
    max_depth: int
    offers: Offers


class SlotCache(Protocol):
    """A drafter's memory of every slot. ``positions[slot]`` pairs (h_i, x_{i+1}) have been absorbed."""

    positions: list[int]

    def reset(self, slot: int, domain: str = "") -> None:
        """Forgets a slot, whose next text is of ``domain``."""

    @property
    def num_bytes(self) -> int:
        """Bytes of its storage."""


CacheT = TypeVar("CacheT", bound=SlotCache)


class Drafter(Protocol[CacheT]):
    """Drafts one tree per request and cycle."""

    @property
    def settings(self) -> DraftSettings:
        """How trees are grown."""

    @property
    def model(self) -> nn.Module:
        """The network, or a module without parameters; its state is what a swap replaces."""

    @property
    def max_depth(self) -> int:
        """Deepest node a tree can have."""

    @property
    def shares_noise(self) -> bool:
        """Whether ``draft`` wants the target's noise."""

    @property
    def vocab_size(self) -> int:
        """Tokens of the target's vocabulary, which is how wide its noise is."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the features it takes."""

    def new_cache(self, num_slots: int, capacity_positions: int) -> CacheT:
        """Memory for ``num_slots`` requests of at most ``capacity_positions`` tokens."""

    def use_graphs(self, cache: CacheT) -> None:
        """From now on records what it runs over a cache that will serve for long, if it can."""

    def refresh(self, cache: CacheT, slots: list[int], new: NewPositions) -> object:
        """Absorbs new positions without drafting."""

    def draft(
        self,
        cache: CacheT,
        slots: list[int],
        new: NewPositions,
        root_token: Tensor,
        sampling: SamplingBatch,
        noise: NoiseWindow | None,
        limits: Limits | None = None,
    ) -> Draft:
        """Absorbs new positions and grows one tree per request; see ``BlockDrafter.draft``."""

    def parameter_groups(self) -> Mapping[str, tuple[str, ...]]:
        """Name -> shell patterns over parameter names: what an update may move. Empty if there is nothing to train."""


AnyDrafter = Drafter[Any]
"""A drafter together with whatever cache it makes: callers only pass the one back to the other."""

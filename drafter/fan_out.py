"""How many tokens of a slot become nodes: rank table, probability caps and stop rule, as data.

Legend: B requests, n leaves, K slots. Source: method reference section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specblock.drafter.config import DraftSettings

_NO_CAP = 1 << 62


@dataclass(frozen=True, slots=True)
class FanOutRule:
    """The rule of some ``DraftSettings``, as tensors.

    Attributes:
        table: int64 [classes], fan-out by rank class, 0 stops.
        limits, caps: float32 [m] ascending greedy probabilities and int64 [m + 1], the largest fan-out between them.
        first_limits, first_fan_out: the same for block 1's first slot, whose fan-out depends on nothing else.
    """

    table: Tensor
    limits: Tensor
    caps: Tensor
    first_limits: Tensor
    first_fan_out: Tensor

    @classmethod
    def of(cls, settings: DraftSettings, device: torch.device | str = "cpu") -> FanOutRule:
        """Reads the settings; of several entries that hold, the narrowest cap and block 1's earliest entry count."""
        limits = sorted({limit for limit, _ in settings.other_caps})
        first_limits = sorted({limit for limit, _ in settings.first_caps})

        def held(caps: tuple[tuple[float, int], ...], reached: list[float]) -> list[int]:
            return [cap for limit, cap in caps if limit in reached]

        caps = [min(held(settings.other_caps, limits[:i]), default=_NO_CAP) for i in range(len(limits) + 1)]
        first = [
            min((held(settings.first_caps, first_limits[:i]) or [settings.beam])[0], settings.beam)
            for i in range(len(first_limits) + 1)
        ]
        return cls(
            torch.tensor(settings.fan_out, device=device),
            torch.tensor(limits, dtype=torch.float32, device=device),
            torch.tensor(caps, device=device),
            torch.tensor(first_limits, dtype=torch.float32, device=device),
            torch.tensor(first, device=device),
        )

    def fan_out(self, rank_BnK: Tensor, greedy_p_BnK: Tensor, first: bool) -> Tensor:
        """Tokens kept per slot, the greedy one included; 0 from the first slot that gives up onward.

        Args:
            rank_BnK: int64, rank class of each slot.
            greedy_p_BnK: float32, probability of its best token.
            first: these are slots of block 1.
        """
        wanted, greedy_p_BnK = self.table[rank_BnK], greedy_p_BnK.contiguous()
        open_slots = wanted > 0
        kept = torch.minimum(wanted, self.caps[torch.bucketize(greedy_p_BnK, self.limits, right=True)])
        if first:
            kept[..., 0] = self.first_fan_out[
                torch.bucketize(greedy_p_BnK[..., 0].contiguous(), self.first_limits, right=True)
            ]
            open_slots[..., 0] = True
        return kept * torch.cumprod(open_slots.to(kept.dtype), dim=-1)

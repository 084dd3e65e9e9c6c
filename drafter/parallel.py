"""The parallel drafter: Medusa-style heads, all tokens of a cycle from one forward without attention.

Every head is a residual block on a shared state and predicts one slot; all share the draft head. Other than the
published heads, the state also sees the token that was just chosen: without it the first head would guess a token
that is already known, and the comparison would be too easy.

Legend: B batch, P positions, K heads (slots), H hidden, F = 3H fused features.
Source: Medusa (Cai et al., arXiv 2401.10774), heads of section 2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specblock.drafter.config import DrafterConfig
from specblock.drafter.layers import Attend, Linear, RMSNorm
from specblock.drafter.network import DraftNetwork


class ParallelModel(DraftNetwork):
    """K heads over one state; slots are independent given the position."""

    independent_slots = True
    feature_projection = "condition_proj."
    last_layer = "heads.*"

    def __init__(self, config: DrafterConfig, embedding: Tensor) -> None:
        super().__init__(config, embedding)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        num_features = max(1, len(config.feature_layers) or 3)
        self.condition_proj = Linear(num_features * hidden, hidden)
        self.condition_norm, self.token_norm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)
        self.fuse = Linear(2 * hidden, hidden)
        self.heads = nn.ModuleList(Linear(hidden, hidden) for _ in range(config.num_slots))

    def first_inputs(self, features_BPF: Tensor, tokens_BP: Tensor) -> Tensor:
        """See DraftNetwork: the shared state, repeated for every head, [B, P, K, H]."""
        condition = self.condition_norm(self.condition_proj(features_BPF))
        token = self.token_norm(self.embed(tokens_BP, condition.dtype))
        state = self.fuse(torch.cat([condition, token], dim=-1))
        return state[:, :, None].expand(-1, -1, self.config.num_slots, -1)

    def later_inputs(self, parents_BPH: Tensor, tokens_BP: Tensor) -> Tensor:
        """Heads draft in one forward; there are no later blocks."""
        raise AssertionError("a parallel drafter has one block")

    def run_layers(
        self, x_BPKH: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, wanted: Tensor | None = None
    ) -> Tensor:
        """See DraftNetwork: a residual block per head."""
        if wanted is not None:
            x_BPKH = x_BPKH[torch.arange(len(wanted), device=wanted.device)[:, None], wanted.view(len(wanted), -1)]
        return torch.stack(
            [x + F.silu(head(x)) for head, x in zip(self.heads, x_BPKH.unbind(dim=2), strict=True)], dim=2
        )

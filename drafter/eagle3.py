"""The EAGLE-3 drafter: one decoder layer whose attention reads ``[embedding; hidden]``, one token per forward.

Tensor names are those of the published weights (``fc``, ``midlayer``, ``norm``, ``lm_head``, ``t2d``, ``d2t``).

Legend: B batch, P positions, H hidden, F = 3H fused features. K = 1 slot.
Source: EAGLE-3 (Li et al., arXiv 2503.01840); method reference section 8.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specblock.drafter.config import DrafterConfig
from specblock.drafter.layers import MLP, Attend, Attention, Linear, RMSNorm, rows_of, take_rows
from specblock.drafter.network import DraftNetwork
from specblock.drafter.whole_layers import DecoderBlock, rest_of_layer, whole_layer


class Eagle3Layer(nn.Module):
    """Decoder layer that attends with twice the hidden size; the residual stream carries the hidden half."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps)
        self.hidden_norm = RMSNorm(hidden, eps)
        self.self_attn = Attention(config, 2 * hidden)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp = MLP(config)
        self._block = DecoderBlock(None, self.self_attn, self.post_attention_layernorm, self.mlp)

    def forward(
        self, x_BT2H: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, asking: Tensor | None = None
    ) -> Tensor:
        """[B, T, 2H] (embedding, hidden) -> [B, T, H], or [B, A, H] of the rows ``asking`` [B, A]."""
        token, hidden = x_BT2H.chunk(2, dim=-1)
        both = torch.cat([self.input_layernorm(token), self.hidden_norm(hidden)], dim=-1)
        whole = whole_layer(both, 0, rotary, attend, asking, self._block, residual=hidden)
        if whole is not None:
            return whole
        attention, norm = self.self_attn, self.post_attention_layernorm
        mixed = attention(both, 0, rotary, attend, asking)
        hidden = hidden if asking is None else take_rows(hidden, asking)
        return rest_of_layer(hidden, mixed, attention.o_proj, norm, self.mlp)


class Eagle3Model(DraftNetwork):
    """EAGLE-3 as a network of one slot: every later block is one more autoregressive step."""

    rotary_advances = True
    feature_projection = "fc."
    last_layer = "midlayer.*"

    def __init__(self, config: DrafterConfig, embedding: Tensor) -> None:
        super().__init__(config, embedding)
        num_features = max(1, len(config.feature_layers) or 3)
        self.fc = Linear(num_features * config.hidden_size, config.hidden_size)
        self.midlayer = Eagle3Layer(config)

    def first_inputs(self, features_BPF: Tensor, tokens_BP: Tensor) -> Tensor:
        """See DraftNetwork: [B, P, 1, 2H]."""
        return self.later_inputs(self.fc(features_BPF), tokens_BP)

    def later_inputs(self, parents_BPH: Tensor, tokens_BP: Tensor) -> Tensor:
        """See DraftNetwork: [B, P, 1, 2H]."""
        return torch.cat([self.embed(tokens_BP, parents_BPH.dtype), parents_BPH], dim=-1)[:, :, None]

    def run_layers(
        self, x_BP12H: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, wanted: Tensor | None = None
    ) -> Tensor:
        """See DraftNetwork: [B, P, 1, 2H] -> u [B, P, 1, H]."""
        asking = rows_of(wanted, x_BP12H.shape[1], 1)
        u: Tensor = self.midlayer(x_BP12H[:, :, 0], rotary, attend, asking)
        return u[:, :, None]

"""The SpecBlock network: block input layer, Llama layers with layer-wise shift, draft head and rank head.

Tensor names are those of the published weights, so checkpoints are interchangeable.

Legend: B batch, P positions, K slots, T = P * K rows, H hidden, F = 3H fused features, Vd draft vocabulary.
Source: method reference section 1 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from specblock.cuda_ext.draft_rows import SlotInputWeights, slot_inputs
from specblock.cuda_ext.slot_layer import LayerStack
from specblock.drafter.config import DrafterConfig
from specblock.drafter.layers import MLP, Attend, Attention, Linear, RMSNorm, rows_of, take_rows, written
from specblock.drafter.network import DraftNetwork
from specblock.drafter.slot_attend import SlotAttend
from specblock.drafter.whole_layers import DecoderBlock, Gathered, rest_of_layer, whole_layer

RANK_FEATURES = 15
RANK_TOP = 20


class InputLayer(nn.Module):
    """Fuses condition, token and slot query into one row per slot (method reference 1.2)."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        num_features = max(1, len(config.feature_layers) or 3)
        self.condition_proj = Linear(num_features * hidden, hidden)
        self.condition_norm = RMSNorm(hidden, eps)
        self.token_norm = RMSNorm(hidden, eps)
        self.position_queries = nn.Embedding(config.num_slots, hidden)
        self.query_norm = RMSNorm(hidden, eps)
        self.fuse = Linear(3 * hidden, hidden, parts=3)  # condition, token, query
        nn.init.normal_(self.position_queries.weight, std=0.02)
        self._slots = torch.empty(0)
        self._slots_state: tuple[tuple[int, int], ...] = ()

    def rows(self, x_BPI: Tensor, tokens_BP: Tensor, embedding: Tensor, projects: bool) -> Tensor:
        """Rows [B, P, K, H] of tokens and their conditions.

        Args:
            x_BPI: target features [B, P, F], or conditions [B, P, H].
            tokens_BP: int64 [B, P].
            embedding: [V, H].
            projects: these are features, which ``condition_proj`` makes conditions of.
        """
        weights = self._packed(embedding)
        if weights is not None:
            projection = self.condition_proj.packed_weight() if projects else None
            return slot_inputs(x_BPI, tokens_BP, embedding, weights, projection)
        condition = self.condition_proj(x_BPI) if projects else x_BPI
        rows: Tensor = self(condition, functional.embedding(tokens_BP, embedding).to(condition.dtype))
        return rows

    def _packed(self, embedding: Tensor) -> SlotInputWeights | None:
        parts = self.fuse.packed_parts()
        if not parts or embedding.dtype != torch.float32:
            return None
        return SlotInputWeights(
            condition_norm=self.condition_norm.weight,
            condition_part=parts[0],
            token_norm=self.token_norm.weight,
            token_part=parts[1],
            eps=self.token_norm.eps,
            slots=self._of_slots(),
        )

    def forward(self, condition_BPH: Tensor, token_BPH: Tensor) -> Tensor:
        """[B, P, H] condition (projected feature or parent's hidden) and embedding -> [B, P, K, H]."""
        # W [c; e; q] is the sum of three products: condition and token once per position, queries once at all.
        shared = self.fuse.part(0, self.condition_norm(condition_BPH))
        shared = shared + self.fuse.part(1, self.token_norm(token_BPH))
        return shared[..., None, :] + self._of_slots()

    def _of_slots(self) -> Tensor:
        """[K, H], the queries' part; outside of training the same until a weight is written to."""
        weights = (self.fuse.weight, self.position_queries.weight, self.query_norm.weight)
        # A recorded graph must compute it: it does not see that weights were exchanged.
        if torch.is_grad_enabled() or not self.fuse.weight.is_cpu:
            return self.fuse.part(2, self.query_norm(self.position_queries.weight))
        state = tuple(written(weight) for weight in weights)
        if state != self._slots_state:
            self._slots = self.fuse.part(2, self.query_norm(self.position_queries.weight))
            self._slots_state = state
        return self._slots


class DecoderLayer(nn.Module):
    """Pre-norm Llama layer."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.block = DecoderBlock(self.input_layernorm, self.self_attn, self.post_attention_layernorm, self.mlp)

    def forward(
        self, x_BTH: Tensor, layer: int, rotary: tuple[Tensor, Tensor], attend: Attend, asking: Tensor | None = None
    ) -> Tensor:
        """[B, T, H] -> [B, T, H], or [B, A, H] of the rows ``asking`` [B, A]."""
        whole = whole_layer(x_BTH, layer, rotary, attend, asking, self.block)
        if whole is not None:
            return whole
        attention, norm = self.self_attn, self.input_layernorm
        mixed = attention.of_normed(x_BTH, norm, layer, rotary, attend, asking)
        x_BTH = x_BTH if asking is None else take_rows(x_BTH, asking)
        return rest_of_layer(x_BTH, mixed, attention.o_proj, self.post_attention_layernorm, self.mlp)


class SpecBlockModel(DraftNetwork):
    """The drafter network. Attention is a parameter, so training and decoding run the same layers."""

    has_rank_head = True
    feature_projection = "input_layer.condition_proj."

    def __init__(self, config: DrafterConfig, embedding: Tensor) -> None:
        super().__init__(config, embedding)
        self.last_layer = f"layers.{config.num_hidden_layers - 1}.*"
        self.input_layer = InputLayer(config)
        layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        shifts = [Linear(2 * config.hidden_size, config.hidden_size) for _ in layers[1:]]
        self.layers, self.shift_proj = nn.ModuleList(layers), nn.ModuleList(shifts)
        maps = [linear for layer in layers for linear in layer.block.linears]
        self._stack = Gathered([*maps, *shifts], self._gather_stack)
        self.rank_head = nn.Sequential(
            Linear(config.hidden_size + RANK_FEATURES, config.rank_hidden_size),
            nn.SiLU(),
            Linear(config.rank_hidden_size, config.rank_classes),
        )

    def first_inputs(self, features_BPF: Tensor, tokens_BP: Tensor) -> Tensor:
        """See DraftNetwork: condition from the target's features -> [B, P, K, H]."""
        return self.input_layer.rows(features_BPF, tokens_BP, self.embedding, projects=True)

    def later_inputs(self, parents_BPH: Tensor, tokens_BP: Tensor) -> Tensor:
        """See DraftNetwork: condition from the parent slot's hidden -> [B, P, K, H]."""
        return self.input_layer.rows(parents_BPH, tokens_BP, self.embedding, projects=False)

    def run_layers(
        self, x_BPKH: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, wanted: Tensor | None = None
    ) -> Tensor:
        """See DraftNetwork: decoder layers with the layer-wise shift between them."""
        batch, positions, slots, hidden = x_BPKH.shape
        x_BTH = x_BPKH.reshape(batch, positions * slots, hidden)
        asking = rows_of(wanted, positions, slots)
        rows = attend.all_rows() if isinstance(attend, SlotAttend) else None
        if rows is not None:
            u, _ = self._stack()(x_BTH, (rotary[0][:, 0], rotary[1][:, 0]), rows, asking=asking)
            return u.view(batch, -1, slots, hidden)
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            x_BTH = layer(x_BTH, index, rotary, attend, asking if last else None)
            if index < len(self.shift_proj):
                x = x_BTH.view(batch, positions, slots, hidden)
                left = torch.cat([x[:, :, :1], x[:, :, :-1]], dim=2)
                x_BTH = self.shift_proj[index](torch.cat([x, left], dim=-1)).view(batch, -1, hidden)
        return x_BTH.view(batch, -1, slots, hidden)

    def _gather_stack(self) -> LayerStack:
        layers, shifts = cast(Sequence[DecoderLayer], self.layers), cast(Sequence[Linear], self.shift_proj)
        packed = [weight for weight in (shift.packed_weight() for shift in shifts) if weight is not None]
        assert len(packed) == len(shifts), "whole layers are asked for where all weights are packed"
        return LayerStack([layer.block.gather() for layer in layers], None, packed, self.config.num_slots)

    def rank_logits(self, normed: Tensor, features: Tensor) -> Tensor:
        """Rank-class logits [..., classes] from stop-gradient hidden [..., H] and rank features [..., 15]."""
        head_input = torch.cat([normed.detach(), features.to(normed.dtype)], dim=-1)
        logits: Tensor = self.rank_head(head_input)
        return logits


def rank_features(top_logits: Tensor) -> Tensor:
    """The 15 inputs of the rank head from the 20 largest draft logits, sorted descending: [..., 20] -> [..., 15].

    Normalised over the top 20 in training and decoding alike (method reference section 3 and 9.6).
    """
    top = top_logits.detach().to(torch.float32)
    log_p = torch.log_softmax(top, dim=-1)
    p = log_p.exp()
    gaps = torch.stack([top[..., 0] - top[..., j] for j in (1, 2, 4)], dim=-1)
    entropy = -(p * log_p).sum(dim=-1, keepdim=True)
    return torch.cat([log_p[..., :10], gaps, p[..., :1], entropy], dim=-1)


def rank_class(rank: Tensor) -> Tensor:
    """Class of a 1-based rank: 1 -> 0, 2-4 -> 1, 5-10 -> 2, above -> 3."""
    return (rank > 1).to(torch.int64) + (rank > 4).to(torch.int64) + (rank > 10).to(torch.int64)

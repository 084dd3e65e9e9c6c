"""The SpecBlock network: block input layer, Llama layers with layer-wise shift, draft head and rank head.

Tensor names are those of the published weights, so checkpoints are interchangeable.

Legend: B batch, P positions, K slots, T = P * K rows, H hidden, F = 3H fused features, Vd draft vocabulary.
Source: method reference section 1 and 3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specblock.drafter.config import DrafterConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, rotated queries [B, heads, T, D], rotated keys [B, kv_heads, T, D], values) -> [B, heads, T, D]."""

RANK_FEATURES = 15
RANK_TOP = 20


class Linear(nn.Linear):
    """A linear map without bias, as every one in the drafter."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]; the typed face of ``nn.Module.__call__``."""
        result: Tensor = super().__call__(x)
        return result


class RMSNorm(nn.Module):
    """Root-mean-square norm computed in float32 and returned in the input's type, as transformers does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self._eps)
        return (wide * self.weight).to(x.dtype)


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
        self.fuse = Linear(3 * hidden, hidden)
        nn.init.normal_(self.position_queries.weight, std=0.02)

    def forward(self, condition_BPH: Tensor, token_BPH: Tensor) -> Tensor:
        """[B, P, H] condition (projected feature or parent's hidden) and embedding -> [B, P, K, H]."""
        hidden = condition_BPH.shape[-1]
        to_condition, to_token, to_query = torch.split(self.fuse.weight, hidden, dim=1)
        # W [c; e; q] is the sum of three products: condition and token once per position, queries once at all.
        shared = F.linear(self.condition_norm(condition_BPH), to_condition)
        shared = shared + F.linear(self.token_norm(token_BPH), to_token)
        query = F.linear(self.query_norm(self.position_queries.weight), to_query)
        return shared[..., None, :] + query


class Attention(nn.Module):
    """Grouped-query projections; the caller supplies what rows attend to."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.hidden_size, config.num_attention_heads * config.head_dim)
        self.k_proj = Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.v_proj = Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)

    def forward(self, x_BTH: Tensor, layer: int, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Projects, rotates, attends, projects back: [B, T, H] -> [B, T, H]."""
        batch, rows, _ = x_BTH.shape

        def heads(projected: Tensor) -> Tensor:
            return projected.view(batch, rows, -1, self.head_dim).transpose(1, 2)

        query = rotate(heads(self.q_proj(x_BTH)), rotary)
        key = rotate(heads(self.k_proj(x_BTH)), rotary)
        mixed = attend(layer, query, key, heads(self.v_proj(x_BTH)))
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, rows, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm Llama layer."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTH: Tensor, layer: int, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """[B, T, H] -> [B, T, H]."""
        x_BTH = x_BTH + self.self_attn(self.input_layernorm(x_BTH), layer, rotary, attend)
        mixed: Tensor = x_BTH + self.mlp(self.post_attention_layernorm(x_BTH))
        return mixed


class SpecBlockModel(nn.Module):
    """The drafter network. Attention is a parameter, so training and decoding run the same layers."""

    t2d: Tensor
    d2t: Tensor
    embedding: Tensor
    draft_ids: Tensor
    to_draft: Tensor

    def __init__(self, config: DrafterConfig, embedding: Tensor) -> None:
        """Args:
        config: architecture.
        embedding: the target's input embedding [V, H]; frozen, shared, not part of the checkpoint.
        """
        super().__init__()
        if tuple(embedding.shape) != (config.vocab_size, config.hidden_size):
            raise ValueError(
                f"drafter does not fit the target: embedding is {tuple(embedding.shape)}, "
                f"drafter expects ({config.vocab_size}, {config.hidden_size})"
            )
        self.config = config
        self.input_layer = InputLayer(config)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.shift_proj = nn.ModuleList(
            Linear(2 * config.hidden_size, config.hidden_size) for _ in range(config.num_hidden_layers - 1)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.draft_vocab_size)
        self.rank_head = nn.Sequential(
            Linear(config.hidden_size + RANK_FEATURES, config.rank_hidden_size),
            nn.SiLU(),
            Linear(config.rank_hidden_size, config.rank_classes),
        )
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("embedding", embedding.detach(), persistent=False)
        self.register_buffer("draft_ids", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("to_draft", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.set_vocabulary(torch.arange(config.draft_vocab_size))

    def set_vocabulary(self, kept: Tensor) -> None:
        """Sets the draft vocabulary to the ascending target ids ``kept`` int64 [Vd] (method reference 1.7)."""
        assert kept.shape[0] == self.config.draft_vocab_size
        with torch.no_grad():
            self.t2d.zero_()[kept] = True
            self.d2t.copy_(kept - torch.arange(kept.shape[0], device=kept.device))
        self.refresh_vocabulary()

    def refresh_vocabulary(self) -> None:
        """Recomputes the derived index tables after ``t2d`` and ``d2t`` were loaded."""
        ids = torch.arange(self.d2t.shape[0], device=self.d2t.device) + self.d2t
        self.draft_ids = ids  # [Vd] target id of each draft id
        to_draft = torch.full((self.t2d.shape[0],), -1, dtype=torch.int64, device=ids.device)
        to_draft[ids] = torch.arange(ids.shape[0], device=ids.device)
        self.to_draft = to_draft  # [V] draft id of each target id, -1 outside

    @property
    def full_vocabulary(self) -> bool:
        """True when draft ids and target ids are the same."""
        return self.config.draft_vocab_size == self.config.vocab_size

    def first_inputs(self, features_BPF: Tensor, tokens_BP: Tensor) -> Tensor:
        """Rows of the first block: target features and the token that follows each -> [B, P, K, H]."""
        condition = self.input_layer.condition_proj(features_BPF)
        rows: Tensor = self.input_layer(condition, F.embedding(tokens_BP, self.embedding).to(condition.dtype))
        return rows

    def later_inputs(self, parents_BPH: Tensor, tokens_BP: Tensor) -> Tensor:
        """Rows of a later block: pre-final-norm hidden of the parent slot and token -> [B, P, K, H]."""
        rows: Tensor = self.input_layer(parents_BPH, F.embedding(tokens_BP, self.embedding).to(parents_BPH.dtype))
        return rows

    def run_layers(self, x_BPKH: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Decoder layers with the layer-wise shift between them: [B, P, K, H] -> u [B, P, K, H] (pre-final-norm)."""
        batch, positions, slots, hidden = x_BPKH.shape
        x_BTH = x_BPKH.reshape(batch, positions * slots, hidden)
        for index, layer in enumerate(self.layers):
            x_BTH = layer(x_BTH, index, rotary, attend)
            if index < len(self.shift_proj):
                x = x_BTH.view(batch, positions, slots, hidden)
                left = torch.cat([x[:, :, :1], x[:, :, :-1]], dim=2)
                x_BTH = self.shift_proj[index](torch.cat([x, left], dim=-1)).view(batch, -1, hidden)
        return x_BTH.view(batch, positions, slots, hidden)

    def rotary_tables(self, index_BT: Tensor) -> tuple[Tensor, Tensor]:
        """float32 cos and sin [B, 1, T, D] for rotary indices int64 [B, T] (kept in float32; method reference 9.9)."""
        half = torch.arange(0, self.config.head_dim, 2, device=index_BT.device, dtype=torch.float32)
        frequency = self.config.rope_theta ** (-half / self.config.head_dim)
        angle = index_BT[:, None, :, None].to(torch.float32) * frequency
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos(), angle.sin()

    def rotary_index(self, positions_BP: Tensor) -> Tensor:
        """Rotary index of every row, int64 [B, P * K]: ``position + 1 + slot``, the same in every block (1.3, 9.5)."""
        slots = torch.arange(self.config.num_slots, device=positions_BP.device)
        return (positions_BP[:, :, None] + 1 + slots).flatten(1)

    def rank_logits(self, normed: Tensor, features: Tensor) -> Tensor:
        """Rank-class logits [..., classes] from stop-gradient hidden [..., H] and rank features [..., 15]."""
        head_input = torch.cat([normed.detach(), features.to(normed.dtype)], dim=-1)
        logits: Tensor = self.rank_head(head_input)
        return logits


def rotate(x_BHTD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding in the half-split layout, computed in float32."""
    cos, sin = rotary
    wide = x_BHTD.to(torch.promote_types(x_BHTD.dtype, torch.float32))
    left, right = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-right, left], dim=-1) * sin).to(x_BHTD.dtype)


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


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Grouped-query attention without repeating keys: groups become extra query rows.

    Args:
        query: [B, heads, T, D].
        key: [B, kv_heads, S, D].
        value: [B, kv_heads, S, D].
        mask: bool [B, T, S].

    Returns:
        [B, heads, T, D].
    """
    batch, heads, rows, dim = query.shape
    groups = heads // key.shape[1]
    packed = query.reshape(batch, key.shape[1], groups * rows, dim)
    wide_mask = mask[:, None].expand(-1, groups, -1, -1).reshape(batch, 1, groups * rows, -1)
    mixed = F.scaled_dot_product_attention(packed, key, value, attn_mask=wide_mask)
    return mixed.view(batch, heads, rows, dim)

"""What every drafter network shares: Llama pieces, draft vocabulary, head, and the face the drafting code sees.

A network predicts K tokens ("slots") from one position in one forward: SpecBlock four, EAGLE-3 one, parallel heads
as many as it has heads. Growing trees, training, replay and checkpoints are written once against this class.

Legend: B batch, P positions, K slots, T = P * K rows, H hidden, F = 3H fused features, V and Vd target and draft
vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specblock.cuda_ext.linear import PackedWeight, can_pack, pack
from specblock.cuda_ext.norm import rms_norm
from specblock.drafter.config import DrafterConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, rotated queries [B, heads, T, D], rotated keys [B, kv_heads, T, D], values) -> [B, T, heads, D]."""


class Linear(nn.Linear):
    """A linear map without bias, as every one in the drafter.

    Its input may be a concatenation of ``parts`` equally long pieces, each of which can be multiplied on its own:
    ``W [a; b] = part(0, a) + part(1, b)``. After ``pack`` the native product serves, until the weight is written to.
    """

    def __init__(self, in_features: int, out_features: int, parts: int = 1) -> None:
        super().__init__(in_features, out_features, bias=False)
        self._parts = parts
        self._packed: tuple[PackedWeight, ...] = ()
        self._packed_state = (-1, -1)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]; the typed face of ``nn.Module.__call__``."""
        result: Tensor = super().__call__(x)
        return result

    def forward(self, x: Tensor) -> Tensor:
        """See ``__call__``."""
        if not self._packed or torch.is_grad_enabled():
            return F.linear(x, self.weight)
        pieces = self._current()
        if len(pieces) == 1:
            return pieces[0](x)
        inputs = x.chunk(len(pieces), dim=-1)
        return torch.stack([piece(taken) for piece, taken in zip(pieces, inputs, strict=True)]).sum(dim=0)

    def part(self, index: int, x: Tensor) -> Tensor:
        """The contribution of one piece of the input: [..., in / parts] -> [..., out]."""
        if not self._packed or torch.is_grad_enabled():
            return F.linear(x, self.weight.chunk(self._parts, dim=1)[index])
        return self._current()[index](x)

    def pack(self) -> None:
        """From here on, outside of training, the native product serves where it can."""
        if can_pack(self.weight):
            self._packed = tuple(pack(piece) for piece in self.weight.chunk(self._parts, dim=1))
            self._packed_state = self._state()

    def _current(self) -> tuple[PackedWeight, ...]:
        if self._packed_state != self._state():  # new weights were loaded
            self.pack()
        return self._packed

    def _state(self) -> tuple[int, int]:
        return self.weight.data_ptr(), self.weight._version


class RMSNorm(nn.Module):
    """Root-mean-square norm computed in float32 and returned in the input's type, as transformers does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension."""
        return rms_norm(x, self.weight, self._eps)


class Attention(nn.Module):
    """Grouped-query projections; the caller supplies what rows attend to."""

    def __init__(self, config: DrafterConfig, in_features: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Linear(in_features, config.num_attention_heads * config.head_dim)
        self.k_proj = Linear(in_features, config.num_key_value_heads * config.head_dim)
        self.v_proj = Linear(in_features, config.num_key_value_heads * config.head_dim)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)

    def forward(self, x_BTH: Tensor, layer: int, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Projects, rotates, attends, projects back: [B, T, in_features] -> [B, T, H]."""
        batch, rows, _ = x_BTH.shape

        def heads(projected: Tensor) -> Tensor:
            return projected.view(batch, rows, -1, self.head_dim).transpose(1, 2)

        query = rotate(heads(self.q_proj(x_BTH)), rotary)
        key = rotate(heads(self.k_proj(x_BTH)), rotary)
        mixed = attend(layer, query, key, heads(self.v_proj(x_BTH)))
        return self.o_proj(mixed.reshape(batch, rows, -1))


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


class DraftNetwork(nn.Module, ABC):
    """Base of the networks: frozen target embedding, final norm, draft head, vocabulary maps, rotary tables.

    Attributes:
        config: architecture.
        norm: final norm.
        lm_head: draft head [Vd, H].
    """

    t2d: Tensor
    d2t: Tensor
    embedding: Tensor
    draft_ids: Tensor
    to_draft: Tensor

    has_rank_head = False
    """Whether :meth:`rank_logits` exists, so that fan-outs can follow it."""
    independent_slots = False
    """Whether slots say nothing about each other, so that any token of a slot may follow any of the one before."""
    feature_projection = ""
    """Prefix of the parameters that only the first block reads."""
    last_layer = "layers.*"
    """Pattern of the parameters of the last layer."""
    rotary_advances = False
    """Whether the rotary index of a later block moves on with the depth of its leaf."""

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
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.draft_vocab_size)
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("embedding", embedding.detach(), persistent=False)
        self.register_buffer("draft_ids", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("to_draft", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.set_vocabulary(torch.arange(config.draft_vocab_size))

    @abstractmethod
    def first_inputs(self, features_BPF: Tensor, tokens_BP: Tensor) -> Tensor:
        """Rows of the first block from target features and the token that follows each: [B, P, K, rows' size]."""

    @abstractmethod
    def later_inputs(self, parents_BPH: Tensor, tokens_BP: Tensor) -> Tensor:
        """Rows of a later block from the parent slot's pre-final-norm hidden and a token: [B, P, K, rows' size]."""

    @abstractmethod
    def run_layers(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """The layers: rows of ``first_inputs`` or ``later_inputs`` -> u [B, P, K, H] (pre-final-norm)."""

    def rank_logits(self, normed: Tensor, features: Tensor) -> Tensor:
        """Rank-class logits [..., classes] of each slot; only where ``has_rank_head``."""
        raise AssertionError(f"{type(self).__name__} has no rank head")

    def parameter_groups(self) -> dict[str, tuple[str, ...]]:
        """What an update may move, cheapest first: name -> shell patterns over parameter names."""
        groups: dict[str, tuple[str, ...]] = {"rank_head": ("rank_head.*",)} if self.has_rank_head else {}
        last = self.last_layer
        return groups | {"head": ("lm_head.*", "norm.*"), "last_layer": ("lm_head.*", "norm.*", last), "full": ("*",)}

    def rotary_index(self, positions_BP: Tensor, depth_BP: Tensor | int = 0) -> Tensor:
        """Rotary index of every row, int64 [B, P * K]: ``position + 1 + slot``.

        Args:
            positions_BP: int64 [B, P], positions the rows belong to.
            depth_BP: depth of the leaf a later block extends; ignored unless ``rotary_advances``.
        """
        slots = torch.arange(self.config.num_slots, device=positions_BP.device)
        start = positions_BP + depth_BP if self.rotary_advances else positions_BP
        return (start[:, :, None] + 1 + slots).flatten(1)

    def rotary_tables(self, index_BT: Tensor) -> tuple[Tensor, Tensor]:
        """float32 cos and sin [B, 1, T, D] for rotary indices int64 [B, T] (kept in float32; method reference 9.9)."""
        half = torch.arange(0, self.config.head_dim, 2, device=index_BT.device, dtype=torch.float32)
        frequency = self.config.rope_theta ** (-half / self.config.head_dim)
        angle = index_BT[:, None, :, None].to(torch.float32) * frequency
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos(), angle.sin()

    def pack(self) -> DraftNetwork:
        """Prepares for drafting: see ``Linear.pack``."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()
        return self

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Target embeddings of int64 tokens, [..., H]."""
        return F.embedding(tokens, self.embedding).to(dtype)

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


def rotate(x_BHTD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding in the half-split layout, computed in float32."""
    cos, sin = rotary
    wide = x_BHTD.to(torch.promote_types(x_BHTD.dtype, torch.float32))
    left, right = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-right, left], dim=-1) * sin).to(x_BHTD.dtype)

"""What every drafter network shares: draft vocabulary, head, and the face the drafting code sees.

A network predicts K tokens ("slots") from one position in one forward: SpecBlock four, EAGLE-3 one, parallel heads
as many as it has heads. Growing trees, training, replay and checkpoints are written once against this class.

Legend: B batch, P positions, K slots, T = P * K rows, H hidden, F = 3H fused features, V and Vd target and draft
vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specblock.cuda_ext.linear import can_pack, round_weights
from specblock.cuda_ext.recording import kept_in_place
from specblock.drafter.config import DrafterConfig
from specblock.drafter.layers import Attend, Linear, RMSNorm
from specblock.drafter.precision import NumberFormat
from specblock.drafter.token_bias import TokenBias
from specblock.drafter.token_pairs import TOKEN_PAIRS, TokenPairs, room_for


class DraftNetwork(nn.Module, ABC):
    """Base of the networks: frozen target embedding, final norm, draft head, vocabulary maps, rotary tables.

    Attributes:
        config: architecture.
        norm: final norm.
        lm_head: draft head [Vd, H].
        token_bias: what is added to its logits for a kind of text.
        token_pairs: which token follows which; ranks what follows within a block.
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
        self.token_bias = TokenBias(config.draft_vocab_size)
        self.token_pairs = TokenPairs(config.vocab_size, room_for(config.vocab_size) if self.has_chains else 0)
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("embedding", embedding.detach(), persistent=False)
        self.register_buffer("draft_ids", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("to_draft", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.set_vocabulary(torch.arange(config.draft_vocab_size))
        self._frequency = torch.empty(0, device="meta")

    @abstractmethod
    def first_inputs(self, features_BPF: Tensor, tokens_BP: Tensor) -> Tensor:
        """Rows of the first block from target features and the token that follows each: [B, P, K, rows' size]."""

    @abstractmethod
    def later_inputs(self, parents_BPH: Tensor, tokens_BP: Tensor) -> Tensor:
        """Rows of a later block from the parent slot's pre-final-norm hidden and a token: [B, P, K, rows' size]."""

    @abstractmethod
    def run_layers(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, wanted: Tensor | None = None
    ) -> Tensor:
        """The layers: rows of ``first_inputs`` or ``later_inputs`` -> u [B, P, K, H] (pre-final-norm).

        With ``wanted`` int64 [B] (N = 1) or [B, N], only u of those positions is computed, [B, N, K, H]; all positions
        still leave their keys and values.
        """

    def rank_logits(self, normed: Tensor, features: Tensor) -> Tensor:
        """Rank-class logits [..., classes] of each slot; only where ``has_rank_head``."""
        raise AssertionError(f"{type(self).__name__} has no rank head")

    def parameter_groups(self) -> dict[str, tuple[str, ...]]:
        """What an update may move, cheapest first: name -> shell patterns over parameter names."""
        groups: dict[str, tuple[str, ...]] = {"statistics": ("token_bias.*",)}
        if self.has_chains:
            groups["pairs"] = (TOKEN_PAIRS,)
        if self.has_rank_head:
            groups["rank_head"] = ("rank_head.*",)
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
        angle = index_BT[:, None, :, None].to(torch.float32) * self._frequencies(index_BT.device)
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos(), angle.sin()

    def _frequencies(self, device: torch.device) -> Tensor:
        """float32 [D / 2]; made once per device, no buffer, so that no cast of the network rounds them."""
        if self._frequency.device != device:
            with torch.inference_mode(False):
                half = torch.arange(0, self.config.head_dim, 2, device=device, dtype=torch.float32)
                self._frequency = self.config.rope_theta ** (-half / self.config.head_dim)
        return self._frequency

    def pack(self) -> DraftNetwork:
        """Prepares for drafting: see ``Linear.pack``."""
        for linear in self._linears():
            linear.pack()
        return self

    def _linears(self) -> list[Linear]:
        return [module for module in self.modules() if isinstance(module, Linear)]

    def serve_in(self, numbers: NumberFormat) -> DraftNetwork:
        """Takes the format that engines run it in; its weights become numbers of that format."""
        self.to(numbers.dtype)
        if numbers.coarse:
            round_weights(self)
        return self.round_rows(numbers.coarse)

    def round_rows(self, rounds: bool = True) -> DraftNetwork:
        """From here on native products round what they multiply to bfloat16, where that is faster; or no longer."""
        for linear in self._linears():
            linear.coarse = rounds
        return self

    @contextmanager
    def coarsely(self) -> Iterator[None]:
        """Inside it rounds rows in any case: for those that are only context."""
        linears = self._linears()
        before = linears[0].coarse
        for linear in linears:
            linear.coarse = True
        try:
            yield
        finally:
            for linear in linears:
                linear.coarse = before

    @property
    def has_chains(self) -> bool:
        """Whether a slot may stand behind another of its block, whose token it was not told."""
        return self.config.num_slots > 1 and not self.independent_slots

    @property
    def packs(self) -> bool:
        """Whether ``pack`` prepares every linear map and heads fit: outside of training, a layer is one native call."""
        return self.config.head_dim % 16 == 0 and all(can_pack(linear.weight) for linear in self._linears())

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
        """Recomputes the derived index tables after weights were loaded."""
        order = torch.arange(self.d2t.shape[0], device=self.d2t.device)
        ids = order + self.d2t
        to_draft = torch.full((self.t2d.shape[0],), -1, dtype=torch.int64, device=ids.device).index_copy_(0, ids, order)
        self.draft_ids = kept_in_place(self.draft_ids, ids)  # [Vd] target id of each draft id
        self.to_draft = kept_in_place(self.to_draft, to_draft)  # [V] draft id of each target id, -1 outside
        self.token_bias.refresh()
        self.token_pairs.refresh()

    @property
    def full_vocabulary(self) -> bool:
        """True when draft ids and target ids are the same."""
        return self.config.draft_vocab_size == self.config.vocab_size

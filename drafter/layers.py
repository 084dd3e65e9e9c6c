"""Pieces that the drafter networks are made of: linear maps, norm, attention, SwiGLU, rotary embedding.

Legend: B batch, T rows, A rows that look for something, K slots, H hidden, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specblock.cuda_ext.fused import gated, rotary_heads
from specblock.cuda_ext.layer import AttentionWeights, attention_inputs
from specblock.cuda_ext.linear import PackedWeight, can_pack, pack, swiglu
from specblock.cuda_ext.norm import rms_norm
from specblock.drafter.config import DrafterConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, rotated queries [B, heads, T, D], rotated keys [B, kv_heads, T, D], values) -> [B, T, heads, D]."""


class Linear(nn.Linear):
    """A linear map without bias, as every one in the drafter.

    While ``coarse`` is set, the native product may round its input to bfloat16 (see ``DraftNetwork.round_rows``).

    Its input may be a concatenation of ``parts`` equally long pieces, each of which can be multiplied on its own:
    ``W [a; b] = part(0, a) + part(1, b)``. After ``pack`` the native product serves; a weight that was written to,
    moved or cast is noticed (writing through ``weight.data`` is not).
    """

    def __init__(self, in_features: int, out_features: int, parts: int = 1) -> None:
        super().__init__(in_features, out_features, bias=False)
        self._parts = parts
        self.coarse = False
        self._packed: dict[bool, tuple[PackedWeight, ...]] = {}  # by whether products are coarse; they share panels
        self._packed_state = (-1, -1)
        self._times_packed = 0

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]; the typed face of ``nn.Module.__call__``."""
        result: Tensor = super().__call__(x)
        return result

    def forward(self, x: Tensor) -> Tensor:
        """See ``__call__``."""
        pieces = self.packed_parts()
        if not pieces:
            return F.linear(x, self.weight)
        if len(pieces) == 1:
            return pieces[0](x)
        inputs = x.chunk(len(pieces), dim=-1)
        return torch.stack([piece(taken) for piece, taken in zip(pieces, inputs, strict=True)]).sum(dim=0)

    def part(self, index: int, x: Tensor) -> Tensor:
        """The contribution of one piece of the input: [..., in / parts] -> [..., out]."""
        pieces = self.packed_parts()
        return pieces[index](x) if pieces else F.linear(x, self.weight.chunk(self._parts, dim=1)[index])

    def pack(self) -> None:
        """From here on, outside of training, the native product serves where it can."""
        self._packed = {}
        if can_pack(self.weight):
            exact = tuple(pack(piece) for piece in self.weight.chunk(self._parts, dim=1))
            self._packed = {False: exact, True: tuple(replace(piece, coarse=True) for piece in exact)}
        self._packed_state = written(self.weight)
        self._times_packed += 1

    @property
    def num_bytes(self) -> int:
        """Bytes that one product reads."""
        stored = [piece.panels for piece in self._packed.get(False, ())] or [self.weight]
        return sum(tensor.numel() * tensor.element_size() for tensor in stored)

    @property
    def state(self) -> tuple[bool, int, int, int]:
        """Changes with everything that ``packed_weight`` depends on."""
        return (self.coarse, self._times_packed, *self._written())

    def packed_weight(self) -> PackedWeight | None:
        """The whole weight for the native product; None where PyTorch's serves."""
        pieces = self.packed_parts()
        return pieces[0] if len(pieces) == 1 else None

    def packed_parts(self) -> tuple[PackedWeight, ...]:
        """The pieces for native products, in order; none where PyTorch's serves."""
        if not self._packed or torch.is_grad_enabled():
            return ()
        if self._packed_state != self._written():  # new weights were loaded
            self.pack()
        return self._packed.get(self.coarse, ())

    def _written(self) -> tuple[int, int]:
        # nn.Module looks in three places for a name, and this is asked of every map in a cycle.
        weight = self._parameters["weight"]
        assert weight is not None
        return written(weight)


def written(weight: Tensor) -> tuple[int, int]:
    """Changes when a weight was moved or written to (through ``weight.data`` it does not)."""
    # Tensors born in inference mode count no versions; nothing writes to such weights.
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version


class RMSNorm(nn.Module):
    """Root-mean-square norm computed in float32 and returned in the input's type, as transformers does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension."""
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query projections; the caller supplies what rows attend to."""

    def __init__(self, config: DrafterConfig, in_features: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Linear(in_features, config.num_attention_heads * config.head_dim)
        self.k_proj = Linear(in_features, config.num_key_value_heads * config.head_dim)
        self.v_proj = Linear(in_features, config.num_key_value_heads * config.head_dim)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)

    def forward(
        self, x_BTH: Tensor, layer: int, rotary: tuple[Tensor, Tensor], attend: Attend, asking: Tensor | None = None
    ) -> Tensor:
        """Projects, rotates, attends: [B, T, in_features] -> [B, T, heads * D]; ``o_proj`` is the caller's.

        With ``asking`` int64 [B, A], rows, only those look for something: the result has A rows.
        """
        key = self._rotated(self.k_proj, x_BTH, rotary)
        value = self._heads(self.v_proj(x_BTH))
        if asking is not None:
            cos, sin = (take_rows(table[:, 0], asking)[:, None] for table in rotary)
            x_BTH, rotary = take_rows(x_BTH, asking), (cos, sin)
        query = self._rotated(self.q_proj, x_BTH, rotary)
        return attend(layer, query, key, value).flatten(2)

    def weights(self, norm: RMSNorm | None) -> AttentionWeights | None:
        """For native calls, of rows that ``norm`` is to normalise; None where something is not packed."""
        query, key, value = (p.packed_weight() for p in (self.q_proj, self.k_proj, self.v_proj))
        if query is None or key is None or value is None:
            return None
        scale, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        return AttentionWeights(norm=scale, eps=eps, query=query, key=key, value=value)

    def of_normed(
        self,
        x_BTH: Tensor,
        norm: RMSNorm,
        layer: int,
        rotary: tuple[Tensor, Tensor],
        attend: Attend,
        asking: Tensor | None = None,
    ) -> Tensor:
        """``forward`` of normalised rows."""
        weights = self.weights(norm)
        if asking is not None or weights is None:
            return self(norm(x_BTH), layer, rotary, attend, asking)
        heads = attention_inputs(x_BTH, weights, (rotary[0][:, 0], rotary[1][:, 0]))
        return attend(layer, *heads).flatten(2)

    def __call__(
        self, x_BTH: Tensor, layer: int, rotary: tuple[Tensor, Tensor], attend: Attend, asking: Tensor | None = None
    ) -> Tensor:
        """The typed face of ``nn.Module.__call__``."""
        result: Tensor = super().__call__(x_BTH, layer, rotary, attend, asking)
        return result

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:2], -1, self.head_dim).transpose(1, 2)

    def _rotated(self, projection: Linear, x_BTH: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        packed = projection.packed_weight()
        cos, sin = rotary[0][:, 0], rotary[1][:, 0]
        if packed is None:
            return rotary_heads(projection(x_BTH), (cos, sin)).transpose(1, 2)
        return packed.heads(x_BTH, (cos, sin))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        gate, up, down = (p.packed_weight() for p in (self.gate_proj, self.up_proj, self.down_proj))
        if gate is not None and up is not None and down is not None:
            return swiglu(x, gate, up, down)
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


def take_rows(x_BTH: Tensor, rows_BA: Tensor) -> Tensor:
    """Some rows of each request: [B, T, H] and int64 [B, A] -> [B, A, H]."""
    return x_BTH.gather(1, rows_BA[:, :, None].expand(-1, -1, x_BTH.shape[-1]))


def rows_of(wanted: Tensor | None, num_positions: int, width: int) -> Tensor | None:
    """int64 [B, N * K]: the rows of the wanted positions [B] (N = 1) or [B, N]; None if that is all there are."""
    if wanted is None or num_positions == 1:
        return None
    first_row = wanted.view(wanted.shape[0], -1, 1) * width
    return (first_row + torch.arange(width, device=wanted.device)).flatten(1)

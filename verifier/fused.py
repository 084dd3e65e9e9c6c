"""Decoder layers for CUDA devices: between the products of a layer, one operation where transformers runs a dozen.

What a recorded forward of few rows takes beside reading its weights is the number of its kernels: each costs some
microseconds, however little it computes. A plain layer has ten here. Weights of products with the same input lie behind
each other, so that one product serves them; the modules they come from keep them as views. The same code runs on any
device through the references.

Legend: B requests, R new rows per request, K hidden size, H heads, G key/value heads, D head size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from specblock.cuda_ext.attention import slot_attention
from specblock.cuda_ext.fused import gated, rotary_store, rotated_heads
from specblock.cuda_ext.native import cuda_native_available
from specblock.cuda_ext.norm import CUDA_TYPES, add_rms_norm, rms_norm
from specblock.verifier.native import NativeNorm, is_plain_decoder, is_plain_norm

if TYPE_CHECKING:
    from specblock.verifier.slots import SlotRows

log = logging.getLogger(__name__)
_KERNELS = ("rms_norm", "add_rms_norm", "rotary_store", "gated", "slot_attention")


def can_fuse(model: Any) -> bool:
    """Whether fused layers would bring something: a CUDA device, a type that the kernels know, and the kernels."""
    weight = model.get_input_embeddings().weight
    fits = weight.is_cuda and weight.dtype in CUDA_TYPES
    return fits and all(cuda_native_available(name) for name in _KERNELS)


class FusedLayer(nn.Module):
    """Takes the place of a plain decoder layer, whose modules stay under their names."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.self_attn = attention = layer.self_attn
        self.mlp = mlp = layer.mlp
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type  # by which some models choose a mask
        self._qkv = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self._gate_up = _joined([mlp.gate_proj, mlp.up_proj])
        self._kv_heads = attention.k_proj.out_features // attention.head_dim
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self._norms = None if q_norm is None or k_norm is None else (q_norm.weight, k_norm.weight)
        self._eps = 0.0 if q_norm is None else float(q_norm.variance_epsilon)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        slot_rows: SlotRows | None = None,
        **others: Any,
    ) -> Tensor:
        """transformers' calling convention; releases differ in what they call the cache. [B, R, K] -> [B, R, K]."""
        before, after = self.input_layernorm, self.post_attention_layernorm
        past = past_key_values if cache is None else cache
        qkv = F.linear(rms_norm(hidden_states, before.weight, float(before.variance_epsilon)), self._qkv)
        if slot_rows is not None:
            mixed = self._by_slot(qkv, position_embeddings, past, slot_rows)
        else:
            mixed = self._by_mask(qkv, position_embeddings, past, attention_mask, others)
        output: Tensor = self.self_attn.o_proj(mixed.flatten(2))
        total, normed = add_rms_norm(output, hidden_states, after.weight, float(after.variance_epsilon))
        gate, up = F.linear(normed, self._gate_up).chunk(2, dim=-1)
        inner = gated(gate, up)
        # The product adds to the residual stream itself; nobody else has seen this sum yet.
        total.flatten(0, 1).addmm_(inner.flatten(0, 1), self.mlp.down_proj.weight.t())
        return total

    def _by_slot(self, qkv: Tensor, rotary: tuple[Tensor, Tensor], past: Any, rows: SlotRows) -> Tensor:
        layer = past.layers[self.self_attn.layer_idx]
        query = rotary_store(qkv, rotary, self._norms, self._eps, layer.keys, layer.values, *layer.places())
        return slot_attention(
            query.transpose(1, 2), layer.keys, layer.values, rows.slots, rows.lengths, rows.visible,
            self.self_attn.scaling,
        )  # fmt: skip

    def _by_mask(
        self, qkv: Tensor, rotary: tuple[Tensor, Tensor], past: Any, mask: Tensor | None, others: dict[str, Any]
    ) -> Tensor:
        heads = rotated_heads(qkv, rotary, self._norms, self._eps, self._kv_heads)
        query, key, value = (x.transpose(1, 2) for x in heads)
        attention = self.self_attn
        if past is not None:
            key, value = past.update(key, value, attention.layer_idx)
        mixed: Tensor
        mixed, _ = sdpa_attention_forward(attention, query, key, value, mask, scaling=attention.scaling, **others)
        return mixed


class FusedLayers:
    """Exchanges what can be fused in a transformers model; the caller must hold the result to the model's own forward.

    Weights then lie elsewhere, so nothing may hold on to their memory from before.
    """

    def __init__(self, model: Any) -> None:
        decoder = model.model
        self._decoder, self._norm, self._layers = decoder, decoder.norm, list(decoder.layers)
        try:
            for index, layer in enumerate(self._layers):
                if is_plain_decoder(layer) and getattr(layer.self_attn, "sliding_window", None) is None:
                    decoder.layers[index] = FusedLayer(layer)
        except torch.OutOfMemoryError as error:  # there must be room for the joined weights of one layer
            log.warning("only some layers could be fused: %s", str(error).splitlines()[0])
        if is_plain_norm(decoder.norm):
            decoder.norm = NativeNorm(decoder.norm)
        if model.get_input_embeddings().weight.is_cuda:
            torch.cuda.empty_cache()  # the pieces that the joined weights have replaced

    def put_back(self) -> None:
        """The model's own layers again; their weights stay views of the joined ones."""
        for index, layer in enumerate(self._layers):
            self._decoder.layers[index] = layer
        self._decoder.norm = self._norm


def _joined(linears: Sequence[nn.Linear]) -> Tensor:
    """One matrix of all their outputs; each keeps its rows of it, and what it had is free."""
    whole = torch.cat([linear.weight.detach() for linear in linears])
    for linear, rows in zip(linears, torch.split(whole, [linear.out_features for linear in linears]), strict=True):
        linear.weight = nn.Parameter(rows, requires_grad=False)
    return whole

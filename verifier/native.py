"""Native layers in a transformers model, through its own extension points: modules and the attention interface.

Which request is served beside which, and with how many draft rows, then changes nothing in a row of the target: matrix
products, norms and attention of a decode cycle compute every row on its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from specblock.cuda_ext.attention import tree_attention
from specblock.cuda_ext.layer import AttentionWeights, RestWeights, attention_inputs, layer_rest
from specblock.cuda_ext.linear import PackedLinear, can_pack, exchange, pack_linears, swiglu
from specblock.cuda_ext.norm import rms_norm
from specblock.cuda_ext.slot_layer import CacheRows, slot_layer

if TYPE_CHECKING:
    from specblock.verifier.slots import SlotRows

ATTENTION = "specblock_tree"
_PLAIN_LAYERS = ("LlamaDecoderLayer", "Qwen3DecoderLayer", "MistralDecoderLayer")
_PLAIN_ATTENTION = ("LlamaAttention", "Qwen3Attention", "MistralAttention")
_PLAIN_MLP = ("LlamaMLP", "Qwen2MLP", "Qwen3MLP", "MistralMLP")
_SILU = (nn.SiLU, SiLUActivation)
_PLAIN_NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm")  # x / rms(x) * weight


class NativeNorm(nn.Module):
    """Takes the place of a transformers RMSNorm."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, float(norm.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., K]."""
        return rms_norm(x, self.weight, self.variance_epsilon)


class NativeMLP(nn.Module):
    """Takes the place of a SwiGLU whose linear maps are packed."""

    def __init__(self, mlp: Any, coarse: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (PackedLinear(p, coarse) for p in _gated(mlp))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., K]."""
        return swiglu(x, self.gate_proj.packed, self.up_proj.packed, self.down_proj.packed)


class NativeAttention(nn.Module):
    """Takes the place of a transformers attention layer with rotary embedding and grouped queries, without biases."""

    def __init__(self, attention: Any, coarse: bool = False) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (PackedLinear(p, coarse) for p in _projections(attention))
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.layer_idx, self.head_dim, self.scaling = attention.layer_idx, attention.head_dim, attention.scaling
        self.num_key_value_groups, self.is_causal = attention.num_key_value_groups, True  # what SDPA asks for

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """transformers' calling convention; releases differ in what they call the cache."""
        query = self._rotated(self.q_proj, hidden_states, position_embeddings, self.q_norm)
        key = self._rotated(self.k_proj, hidden_states, position_embeddings, self.k_norm)
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        past = past_key_values if cache is None else cache
        if past is not None:
            key, value = past.update(key, value, self.layer_idx)
        mixed, _ = _attention(self, query, key, value, attention_mask, scaling=self.scaling, **others)
        return self.o_proj(mixed.flatten(2)), None

    @staticmethod
    def _rotated(projection: PackedLinear, x: Tensor, rotary: tuple[Tensor, Tensor], norm: Any) -> Tensor:
        if norm is None:
            return projection.packed.heads(x, rotary)
        return projection.packed.heads(x, rotary, norm.weight, float(norm.variance_epsilon))


class NativeLayer(nn.Module):
    """Takes the place of a whole decoder layer whose attention, MLP and norms are native."""

    def __init__(self, layer: Any, coarse: bool = False) -> None:
        super().__init__()
        # Under their own names, so that the model looks as it did.
        self.self_attn = attention = NativeAttention(layer.self_attn, coarse)
        self.mlp = mlp = NativeMLP(layer.mlp, coarse)
        self.input_layernorm = before = NativeNorm(layer.input_layernorm)
        self.post_attention_layernorm = after = NativeNorm(layer.post_attention_layernorm)
        query_norm, key_norm = attention.q_norm, attention.k_norm
        self._before = AttentionWeights(
            norm=before.weight,
            eps=before.variance_epsilon,
            query=attention.q_proj.packed,
            key=attention.k_proj.packed,
            value=attention.v_proj.packed,
            query_norm=None if query_norm is None else query_norm.weight,
            key_norm=None if key_norm is None else key_norm.weight,
            head_eps=0.0 if query_norm is None else float(query_norm.variance_epsilon),
        )
        self._after = RestWeights(
            output=attention.o_proj.packed,
            norm=after.weight,
            eps=after.variance_epsilon,
            gate=mlp.gate_proj.packed,
            up=mlp.up_proj.packed,
            down=mlp.down_proj.packed,
        )

    @property
    def weights(self) -> tuple[AttentionWeights, RestWeights]:
        """Packed, before and after its attention."""
        return self._before, self._after

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
        """transformers' calling convention; see ``NativeAttention``. [B, R, K] -> [B, R, K]."""
        attention = self.self_attn
        past = past_key_values if cache is None else cache
        if slot_rows is not None:
            layer = past.layers[attention.layer_idx]
            rows = CacheRows(layer.keys, layer.values, slot_rows.slots, slot_rows.lengths, slot_rows.visible)
            scale = attention.scaling
            return slot_layer(hidden_states, self._before, self._after, position_embeddings, rows, scale=scale)
        query, key, value = attention_inputs(hidden_states, self._before, position_embeddings)
        if past is not None:
            key, value = past.update(key, value, attention.layer_idx)
        mixed, _ = _attention(attention, query, key, value, attention_mask, scaling=attention.scaling, **others)
        return layer_rest(hidden_states, mixed.flatten(2), self._after)


def _projections(attention: Any) -> list[nn.Linear]:
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]


def _gated(mlp: Any) -> list[nn.Linear]:
    return [mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def is_plain_decoder(child: Any) -> bool:
    """Whether a decoder layer is a norm, attention, a norm and a SwiGLU, all without biases, and nothing else."""
    if type(child).__name__ not in _PLAIN_LAYERS:
        return False
    norms = [child.input_layernorm, child.post_attention_layernorm]
    heads = [getattr(child.self_attn, name, None) for name in ("q_norm", "k_norm")]
    plain = all(is_plain_norm(norm) for norm in (*norms, *(norm for norm in heads if norm is not None)))
    return plain and _is_plain_attention(child.self_attn) and _is_plain_mlp(child.mlp)


def is_plain_norm(child: Any) -> bool:
    """Whether it is ``x / rms(x) * weight``."""
    return type(child).__name__ in _PLAIN_NORMS


def _native_decoder(child: nn.Module, coarse: bool) -> nn.Module | None:
    packed = is_plain_decoder(child) and _is_native_attention(child.self_attn) and _is_native_mlp(child.mlp)
    return NativeLayer(child, coarse) if packed else None


def _native_layer(child: nn.Module, coarse: bool) -> nn.Module | None:
    if _is_native_attention(child):
        return NativeAttention(child, coarse)
    return NativeMLP(child, coarse) if _is_native_mlp(child) else None


def _is_plain_attention(child: Any) -> bool:
    return type(child).__name__ in _PLAIN_ATTENTION and all(_plain(p) for p in _projections(child))


def _is_plain_mlp(child: Any) -> bool:
    activation = type(child).__name__ in _PLAIN_MLP and isinstance(child.act_fn, _SILU)
    return activation and all(_plain(p) for p in _gated(child))


def _is_native_attention(child: Any) -> bool:
    return _is_plain_attention(child) and all(can_pack(p.weight) for p in _projections(child))


def _is_native_mlp(child: Any) -> bool:
    return _is_plain_mlp(child) and all(can_pack(p.weight) for p in _gated(child))


def _plain(linear: nn.Module) -> bool:
    return type(linear) is nn.Linear and linear.bias is None


def use_native_layers(model: Any, coarse: bool = False) -> bool:
    """Replaces what has a native counterpart; False if nothing has (another type or device, no library).

    With ``coarse``, rows are rounded to bfloat16 before they are multiplied, where that is faster.

    There is no way back: packed layers keep no ``nn.Linear`` weight, so the model can be neither trained nor saved.
    The caller must hold the result to the model's own forward.
    """
    if not can_pack(model.get_input_embeddings().weight):
        return False
    exchange(model, lambda child: _native_decoder(child, coarse))
    exchange(model, lambda child: _native_layer(child, coarse))
    exchange(model, lambda child: NativeNorm(child) if is_plain_norm(child) else None)
    pack_linears(model, coarse)
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # for the model's own forward, padding and chunks included
    model.config._attn_implementation = ATTENTION
    return True


def takes_slots(model: Any) -> bool:
    """Whether every decoder layer of a native model can run over the slots of a cache."""
    return all(isinstance(layer, NativeLayer) and layer.self_attn.head_dim % 16 == 0 for layer in model.model.layers)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' calling convention: mask bool [B, 1, R, T], result [B, R, heads, D]."""
    if attention_mask is None or attention_mask.dtype != torch.bool or others.get("softcap") is not None:
        mixed, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
        return mixed, None
    return tree_attention(query, key, value, attention_mask[:, 0], scaling), None

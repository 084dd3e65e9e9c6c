"""Native layers in a transformers model, through its own extension points: modules and the attention interface.

Which request is served beside which, and with how many draft rows, then changes nothing in a row of the target: matrix
products, norms and attention of a decode cycle compute every row on its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from specblock.cuda_ext.attention import tree_attention
from specblock.cuda_ext.linear import PackedLinear, can_pack, exchange, pack_linears, swiglu
from specblock.cuda_ext.norm import rms_norm

ATTENTION = "specblock_tree"
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

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (PackedLinear(p) for p in _gated(mlp))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., K]."""
        return swiglu(x, self.gate_proj.packed, self.up_proj.packed, self.down_proj.packed)


class NativeAttention(nn.Module):
    """Takes the place of a transformers attention layer with rotary embedding and grouped queries, without biases."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (PackedLinear(p) for p in _projections(attention))
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


def _projections(attention: Any) -> list[nn.Linear]:
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]


def _gated(mlp: Any) -> list[nn.Linear]:
    return [mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _native_layer(child: nn.Module) -> nn.Module | None:
    name = type(child).__name__
    if name in _PLAIN_ATTENTION and all(_plain(p) for p in _projections(child)):
        return NativeAttention(child)
    if name in _PLAIN_MLP and isinstance(child.act_fn, _SILU) and all(_plain(p) for p in _gated(child)):
        return NativeMLP(child)
    return None


def _plain(linear: nn.Module) -> bool:
    return type(linear) is nn.Linear and linear.bias is None and can_pack(linear.weight)


def use_native_layers(model: Any) -> bool:
    """Replaces what has a native counterpart; False if nothing has (another type or device, no library).

    There is no way back: packed layers keep no ``nn.Linear`` weight, so the model can be neither trained nor saved.
    The caller must hold the result to the model's own forward.
    """
    if not can_pack(model.get_input_embeddings().weight):
        return False
    exchange(model, _native_layer)
    exchange(model, lambda child: NativeNorm(child) if type(child).__name__ in _PLAIN_NORMS else None)
    pack_linears(model)
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # for the model's own forward, padding and chunks included
    model.config._attn_implementation = ATTENTION
    return True


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

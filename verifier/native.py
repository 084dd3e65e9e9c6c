"""Native layers in a transformers model, through its own extension points: modules and the attention interface.

Which request is served beside which, and with how many draft rows, then changes nothing in a row of the target: matrix
products, norms and attention of a decode cycle compute every row on its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from specblock.cuda_ext.attention import tree_attention
from specblock.cuda_ext.linear import can_pack, exchange, pack_linears
from specblock.cuda_ext.norm import rms_norm

ATTENTION = "specblock_tree"
_PLAIN_NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm")  # x / rms(x) * weight


class NativeNorm(nn.Module):
    """Takes the place of a transformers RMSNorm."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, float(norm.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., K]."""
        return rms_norm(x, self.weight, self.variance_epsilon)


def use_native_layers(model: Any) -> bool:
    """Replaces what has a native counterpart; False if nothing has (another type or device, no library).

    There is no way back: packed layers keep no ``nn.Linear`` weight, so the model can be neither trained nor saved.
    The caller must hold the result to the model's own forward.
    """
    if not can_pack(model.get_input_embeddings().weight):
        return False
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

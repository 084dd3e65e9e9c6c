"""The decoder of a native target over the slots of a cache: all its layers in one call.

Legend: B requests, R new rows per request, K hidden size, F fused feature size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from specblock.cuda_ext.slot_layer import CacheRows, LayerStack
from specblock.verifier.native import NativeLayer, NativeNorm, takes_slots

if TYPE_CHECKING:
    from specblock.verifier.kv_cache import TargetCache
    from specblock.verifier.slots import SlotRows

# Embedding, rotary tables, layers, norm, and nothing in between.
_PLAIN_DECODERS = ("LlamaModel", "Qwen3Model", "MistralModel")


class NativeStack:
    """What a transformers decoder does over slots, without its loop over layers.

    Embedding, rotary tables and final norm stay the model's own modules.
    """

    def __init__(self, decoder: Any, feature_layers: Sequence[int]) -> None:
        """Args:
        decoder: of a native model for which ``can_stack``.
        feature_layers: whose residual streams are the features.
        """
        self._decoder, self._feature_layers = decoder, list(feature_layers)
        self._layers = LayerStack([layer.weights for layer in decoder.layers], decoder.layers[0].self_attn.scaling)

    def __call__(self, cache: TargetCache, rows: SlotRows) -> tuple[Tensor, Tensor]:
        """Hidden [B, R, K] after the final norm and features [B, R, F] of new rows; keys and values are written."""
        hidden = self._decoder.embed_tokens(rows.tokens)
        rotary = self._decoder.rotary_emb(hidden, position_ids=rows.lengths[:, None] + rows.depth)
        places = CacheRows(cache.keys, cache.values, rows.slots, rows.lengths, rows.visible)
        hidden, features = self._layers(hidden, rotary, places, self._feature_layers)
        return self._decoder.norm(hidden), features


def can_stack(model: Any) -> bool:
    """Whether a model's decoder is plain around native layers that are all alike."""
    decoder = model.model
    plain = type(decoder).__name__ in _PLAIN_DECODERS and isinstance(decoder.norm, NativeNorm) and takes_slots(model)
    return plain and _alike(decoder.layers)


def _alike(layers: Sequence[NativeLayer]) -> bool:
    scales = {layer.self_attn.scaling for layer in layers}
    return len(scales) == 1 and LayerStack.fits([layer.weights for layer in layers])

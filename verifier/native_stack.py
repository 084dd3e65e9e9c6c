"""The decoder of a native target over the slots of a cache: all its layers in one call.

Legend: B requests, R new rows per request, K hidden size, F fused feature size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional

from specblock.cuda_ext.rotary_tables import RotaryTables
from specblock.cuda_ext.slot_layer import CacheRows, LayerStack
from specblock.verifier.native import NativeLayer, NativeNorm, takes_slots

if TYPE_CHECKING:
    from specblock.verifier.kv_cache import TargetCache
    from specblock.verifier.slots import SlotRows

# Embedding, rotary tables, layers, norm, and nothing in between.
_FIXED_ROTARY = ("default", "linear", "llama3", "yarn")  # others change with the length of the text
_PLAIN_DECODERS = ("LlamaModel", "Qwen3Model", "MistralModel")


class NativeStack:
    """What a transformers decoder does over slots, without its loop over layers.

    The final norm stays the model's own module, and its rotary module makes the tables.
    """

    def __init__(self, decoder: Any, feature_layers: Sequence[int]) -> None:
        """Args:
        decoder: of a native model for which ``can_stack``.
        feature_layers: whose residual streams are the features.
        """
        self._decoder, self._feature_layers = decoder, list(feature_layers)
        self._embedding: Tensor = decoder.embed_tokens.weight
        self._tables = RotaryTables(lambda every: decoder.rotary_emb(self._embedding, position_ids=every))
        self._layers = LayerStack([layer.weights for layer in decoder.layers], decoder.layers[0].self_attn.scaling)

    def __call__(self, cache: TargetCache, rows: SlotRows) -> tuple[Tensor, Tensor]:
        """Hidden [B, R, K] after the final norm and features [B, R, F] of new rows; keys and values are written."""
        hidden = functional.embedding(rows.tokens, self._embedding)
        rotary = self._tables.of(rows.lengths[:, None] + rows.depth, cache.capacity_tokens)
        places = CacheRows(cache.keys, cache.values, rows.slots, rows.lengths, rows.visible)
        hidden, features = self._layers(hidden, rotary, places, self._feature_layers)
        return self._decoder.norm(hidden), features


def can_stack(model: Any) -> bool:
    """Whether a model's decoder is plain around native layers that are all alike."""
    decoder = model.model
    plain = type(decoder).__name__ in _PLAIN_DECODERS and isinstance(decoder.norm, NativeNorm) and takes_slots(model)
    plain = plain and getattr(decoder.rotary_emb, "rope_type", "") in _FIXED_ROTARY
    return plain and _alike(decoder.layers)


def _alike(layers: Sequence[NativeLayer]) -> bool:
    scales = {layer.self_attn.scaling for layer in layers}
    return len(scales) == 1 and LayerStack.fits([layer.weights for layer in layers])

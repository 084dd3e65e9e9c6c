"""A new drafter for a target: shape from the target's configuration, head from the target's own head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specblock.drafter.config import DrafterConfig
from specblock.drafter.network import DraftNetwork
from specblock.drafter.window import Window


def config_for_target(
    target: Any, fingerprint: str, feature_layers: tuple[int, ...], draft_vocab_size: int, kind: str = "specblock"
) -> DrafterConfig:
    """A drafter with the target's geometry (method reference 1.3).

    Args:
        target: the target's transformers configuration (Llama or Qwen3 family).
        fingerprint: the target's fingerprint.
        feature_layers: fused target layers.
        draft_vocab_size: Vd.
        kind: family; SpecBlock has two layers of four slots, EAGLE-3 one of one, parallel heads four slots.
    """
    rope = getattr(target, "rope_parameters", None) or {}
    return DrafterConfig(
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        kind=kind,
        num_slots=1 if kind == "eagle3" else 4,
        num_hidden_layers={"specblock": 2, "eagle3": 1, "parallel": 0}[kind],
        num_attention_heads=target.num_attention_heads,
        num_key_value_heads=target.num_key_value_heads,
        head_dim=getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads,
        vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocab_size,
        rms_norm_eps=target.rms_norm_eps,
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        feature_layers=feature_layers,
        target_fingerprint=fingerprint,
    )


def frequent_tokens(windows: Sequence[Window], vocab_size: int, keep: int) -> Tensor:
    """The ``keep`` most frequent generated tokens, ascending int64 ids (method reference 1.7; ties: lower id)."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for w in windows:
        counts += torch.bincount(w.tokens[w.prompt_tokens :].long(), minlength=vocab_size).cpu()
    return torch.sort(counts, descending=True, stable=True).indices[:keep].sort().values


@torch.no_grad()
def initialise_from_target(model: DraftNetwork, head: Tensor, final_norm: Tensor) -> None:
    """Starts the draft head and final norm as the target's own.

    The published recipe starts them at random and trains on billions of positions; with the tens of thousands that
    one machine affords, starting at the target's head saves most of the way.

    Args:
        model: the drafter.
        head: [V, H], the target's output head.
        final_norm: [H], weight of the target's final norm.
    """
    model.lm_head.weight.copy_(head[model.draft_ids])
    model.norm.weight.copy_(final_norm)

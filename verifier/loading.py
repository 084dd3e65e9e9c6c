"""Opening a target: which models are accepted, and what identifies one."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

_IDENTITY_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
)
_SAMPLED_EMBEDDING_ROWS = 64
SLOT_ATTENTION = "specblock_slots"  # SDPA but for forwards over slots; see slots.py


def open_pretrained(
    path_or_id: str, *, dtype: torch.dtype, device: torch.device | str, local_files_only: bool
) -> tuple[Any, Any]:
    """Loads model and tokenizer, in evaluation mode with frozen weights.

    Raises:
        ValueError: nothing usable is there; the message says what was missing.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        path_or_id, local_files_only = str(path), True
        if not (path / "config.json").is_file():
            raise ValueError(f"target model {path}: no config.json in this directory")
    elif path.exists() or path.is_absolute() or path_or_id.startswith((".", "~")) or path_or_id.count("/") > 1:
        raise ValueError(f"target model {path}: no such directory")
    try:
        config = AutoConfig.from_pretrained(path_or_id, local_files_only=local_files_only)
        check_config(config)
        model = AutoModelForCausalLM.from_pretrained(
            path_or_id, config=config, dtype=dtype, attn_implementation="sdpa", local_files_only=local_files_only
        )
        tokenizer = AutoTokenizer.from_pretrained(path_or_id, local_files_only=local_files_only)
    except (OSError, ValueError) as error:
        raise ValueError(f"target model {path_or_id}: {error}") from error
    return model.to(device), tokenizer


def check_config(config: Any) -> None:
    """Refuses attention that a tree behind a static cache cannot reproduce.

    Raises:
        ValueError: sliding-window or other non-full attention, or rotary frequencies that depend on the batch.
    """
    layer_types = set(getattr(config, "layer_types", None) or ())
    windowed = not layer_types and getattr(config, "sliding_window", None) is not None
    if windowed or layer_types - {"full_attention"}:
        kinds = ", ".join(sorted(layer_types - {"full_attention"})) or "sliding_attention"
        raise ValueError(
            f"incompatible model: {config.model_type} has layers of type {kinds}, only full attention works"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        # Their frequencies follow the longest sequence of the batch, so text would depend on who else is served.
        raise ValueError(f"incompatible model: rotary embedding of type {rope['rope_type']} depends on the batch")


def check_model(model: Any) -> None:
    """Refuses models whose parts are not where the verifier needs them.

    Raises:
        ValueError: no decoder layers under ``model.model.layers``, no output head, or another attention backend.
    """
    name = type(model).__name__
    check_config(model.config)
    if not hasattr(getattr(model, "model", None), "layers") or model.get_output_embeddings() is None:
        raise ValueError(f"incompatible architecture: {name} has no model.layers with an output head")
    if model.config._attn_implementation not in ("sdpa", SLOT_ATTENTION):
        raise ValueError(f"incompatible model: attention must be 'sdpa', not {model.config._attn_implementation!r}")


def cache_argument(decoder: Any) -> str:
    """What this transformers release calls the cache in a decoder's forward: ``cache`` since 5.24, before that
    ``past_key_values``."""
    return "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"


def eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token id that model, generation settings or tokenizer declare as end of text."""
    found: set[int] = set()
    for owner in (model.config, model.generation_config, tokenizer):
        value = getattr(owner, "eos_token_id", None)
        found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return frozenset(found)


def fingerprint(model: Any, tokenizer: Any) -> str:
    """Sixteen hex digits that change when a drafter trained for this target would no longer fit it.

    The weight sample is rounded to bfloat16 first, so the same checkpoint opened in another precision is the same. Of
    the tokenizer the vocabulary counts, and the chat template, if it has one: other roles and markers are other text.
    """
    digest = hashlib.sha256()
    identity = {name: getattr(model.config, name, None) for name in _IDENTITY_FIELDS}
    digest.update(json.dumps(identity, sort_keys=True, default=str).encode())
    embedding_VH = model.get_input_embeddings().weight
    rows = torch.linspace(0, embedding_VH.shape[0] - 1, _SAMPLED_EMBEDDING_ROWS, device=embedding_VH.device).long()
    samples = [embedding_VH[rows]]
    for layer in (model.model.layers[0], model.model.layers[-1]):
        samples.extend(weight for name, weight in layer.named_parameters() if "norm" in name)
    for sample in samples:
        digest.update(sample.detach().to("cpu", torch.bfloat16).to(torch.float32).numpy().tobytes())
    if tokenizer is not None:
        digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
        if template := getattr(tokenizer, "chat_template", None):
            digest.update(json.dumps(template, sort_keys=True).encode())
    return digest.hexdigest()[:16]

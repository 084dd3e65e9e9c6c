"""Drafter directories: ``config.json``, ``model.safetensors`` with the published tensor names and some of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specblock.drafter.config import DrafterConfig
from specblock.drafter.kinds import new_network
from specblock.drafter.network import DraftNetwork
from specblock.drafter.token_pairs import check_pairs

_BIAS = ("token_bias.table", "token_bias.domains", "token_bias.stamps")
_PAIRS = tuple(f"token_pairs.{name}" for name in ("starts", "tokens", "counts", "totals", "unigram"))
_OURS = (*_BIAS, *_PAIRS)
"""Not part of the published format: written only where something was counted, zero where they are missing."""
_BUFFERS = ("t2d", "d2t", "token_bias.domains", "token_bias.stamps", *_PAIRS)


def stored(state: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """A drafter's tensors as they are stored: weights as ``dtype``, vocabulary maps as they are."""
    return {name: tensor.detach() if name in _BUFFERS else tensor.detach().to(dtype) for name, tensor in state.items()}


def save_drafter(model: DraftNetwork, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a drafter; see ``stored``."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(model.config.to_json(), indent=2) + "\n")
    counted = {_BIAS: bool(model.token_bias.domains.any()), _PAIRS: model.token_pairs.used}
    unused = {name for names, used in counted.items() if not used for name in names}
    tensors = {
        name: tensor.cpu().contiguous()
        for name, tensor in stored(model.state_dict(), dtype).items()
        if name not in unused
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def read_config(directory: Path) -> DrafterConfig:
    """The drafter's configuration.

    Raises:
        ValueError: no such drafter, or of no known kind.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"no drafter at {directory}: config.json is missing")
    try:
        return DrafterConfig.from_json(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def load_drafter(
    directory: Path,
    embedding: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    target_fingerprint: str = "",
    feature_layers: tuple[int, ...] = (),
) -> DraftNetwork:
    """Loads a drafter and checks that it fits the target.

    Args:
        directory: drafter directory.
        embedding: the target's input embedding [V, H].
        dtype: type of the weights in memory.
        device: where they go.
        target_fingerprint: refuse a drafter that was trained on another target; empty skips the check.
        feature_layers: the target's fused layers; empty skips the check.

    Raises:
        ValueError: missing or damaged files, wrong names or shapes, or a drafter of another target.
    """
    config = read_config(directory)
    if target_fingerprint and config.target_fingerprint and config.target_fingerprint != target_fingerprint:
        raise ValueError(
            f"drafter {directory} was trained on target {config.target_fingerprint}, this target is "
            f"{target_fingerprint} (weights, vocabulary or chat template differ): train a drafter for it with "
            "`specblockd train`"
        )
    if feature_layers and config.feature_layers and config.feature_layers != feature_layers:
        raise ValueError(
            f"drafter {directory} reads target layers {list(config.feature_layers)}, "
            f"the target gives {list(feature_layers)}"
        )
    model = new_network(config, embedding)
    try:
        tensors = load_file(directory / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"drafter {directory}: model.safetensors cannot be read ({error})") from None
    load_weights(model, tensors, str(directory))
    return model.to(device=device, dtype=dtype)


def load_weights(model: DraftNetwork, tensors: dict[str, Tensor], source: str) -> None:
    """Copies ``tensors`` into the model, names and shapes checked first so that nothing is half-loaded.

    Raises:
        ValueError: a tensor is missing, unknown, of the wrong shape or damaged.
    """
    own = model.state_dict()
    tensors = {name: torch.zeros_like(own[name]) for name in _OURS} | tensors
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unknown:
        raise ValueError(f"drafter {source}: missing tensors {missing}, unknown tensors {unknown}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"drafter {source}: {name} is {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
    check_pairs({name.removeprefix("token_pairs."): tensors[name] for name in _PAIRS})
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    model.refresh_vocabulary()

"""Loads target and drafter as the configuration says; the one place that turns sections into model objects."""

from __future__ import annotations

from pathlib import Path

import torch

from specblock.daemon.config import DaemonConfig
from specblock.daemon.errors import IncompatibleError
from specblock.drafter.checkpoint import load_drafter
from specblock.drafter.config import DraftSettings
from specblock.drafter.model import SpecBlockModel
from specblock.verifier.model import TargetModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def dtype_of(config: DaemonConfig) -> torch.dtype:
    """The type both models run in."""
    return DTYPES[config.target.dtype]


def draft_settings(config: DaemonConfig) -> DraftSettings:
    """Tree settings of the configuration.

    Raises:
        ValueError: from :class:`DraftSettings`.
    """
    d = config.drafter
    return DraftSettings(
        blocks=d.blocks,
        leaf_cap=d.leaf_cap,
        node_budget=d.node_budget,
        beam=d.beam,
        shared_noise=d.shared_noise,
        noise_scale=d.noise_scale,
    )


def load_target(config: DaemonConfig) -> TargetModel:
    """The target.

    Raises:
        IncompatibleError: missing, or of a family that cannot be served.
    """
    try:
        return TargetModel.load(config.target.model, dtype=dtype_of(config), device=config.target.device)
    except ValueError as error:
        raise IncompatibleError(str(error)) from None


def load_version(config: DaemonConfig, target: TargetModel, directory: Path) -> SpecBlockModel:
    """A drafter version, checked against the target.

    Raises:
        IncompatibleError: it does not fit.
    """
    try:
        model = load_drafter(
            directory,
            target.embedding,
            dtype=dtype_of(config),
            device=config.target.device,
            target_fingerprint=target.fingerprint,
            feature_layers=target.feature_layers,
        )
    except ValueError as error:
        raise IncompatibleError(str(error)) from None
    return model.eval()

"""Loads target and drafter; the one place that turns sections of the configuration into model objects.

Imports no configuration at run time, so that measurements on a machine without pydantic can load models too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import snapshot_download

from specblock.daemon.errors import IncompatibleError
from specblock.drafter.checkpoint import load_drafter
from specblock.drafter.config import DraftSettings
from specblock.drafter.draft import BlockDrafter
from specblock.drafter.interface import AnyDrafter
from specblock.drafter.lookup import LookupDrafter
from specblock.drafter.network import DraftNetwork
from specblock.drafter.precision import NumberFormat, number_format, serves_faster_in_bfloat16
from specblock.verifier.model import TargetModel

if TYPE_CHECKING:
    from specblock.daemon.config import DaemonConfig


def format_of(config: DaemonConfig) -> NumberFormat:
    """The format both models run in; the configuration must be settled."""
    return number_format(config.target.dtype, config.target.device)


def serving_dtype(asked: str, device: str) -> str:
    """The number format that ``asked`` means on ``device``: what is faster there if it is "auto"."""
    if asked != "auto":
        return asked
    return "bfloat16" if serves_faster_in_bfloat16(torch.device(device)) else "float32"


def settle_dtype(config: DaemonConfig) -> DaemonConfig:
    """``config`` with the number format that ``target.dtype: auto`` means on this machine.

    Once per process tree and before anything is built from the configuration: the trainer's exact replay must run in
    the engine's format, and a second measurement could come out differently.
    """
    return config.with_dtype(serving_dtype(config.target.dtype, config.target.device))


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
        rank_head=d.rank_head or d.compat == "published",
        shared_noise=d.shared_noise,
        noise_scale=d.noise_scale,
        pair_weight=0.0 if d.compat == "published" else d.pair_weight,
        published_refresh=d.compat == "published",
    )


def load_target(
    model: str,
    numbers: NumberFormat,
    device: str,
    revision: str | None = None,
    native: bool = True,
    graphs: bool = True,
) -> TargetModel:
    """The target, from a directory or a hub id; ``revision`` is a branch, tag or commit of the latter.

    ``native=False`` leaves its layers as transformers made them, for comparisons; ``graphs`` is ``engine.cuda_graphs``.

    Raises:
        IncompatibleError: missing, or of a family that cannot be served.
    """
    try:
        if revision is not None and not Path(model).is_dir():
            model = snapshot_download(model, revision=revision)
        return TargetModel.load(
            model, dtype=numbers.dtype, device=device, native=native, graphs=graphs, coarse=numbers.coarse
        )
    except (ValueError, OSError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]  # the hub's advice goes over several lines
        raise IncompatibleError(reason) from None


def load_network(target: TargetModel, directory: Path) -> DraftNetwork:
    """A drafter's network, checked against the target, in the target's format and on its device.

    Raises:
        IncompatibleError: it does not fit.
    """
    try:
        model = load_drafter(
            directory,
            target.embedding,
            dtype=target.dtype,
            device=target.device,
            target_fingerprint=target.fingerprint,
            feature_layers=target.feature_layers,
        )
    except ValueError as error:
        raise IncompatibleError(str(error)) from None
    return in_format_of(target, model)


def in_format_of(target: TargetModel, network: DraftNetwork) -> DraftNetwork:
    """``network``, ready to draft for ``target`` in the format that it runs in."""
    return network.serve_in(NumberFormat(target.dtype, target.coarse)).eval()


def serving_drafter(config: DaemonConfig, target: TargetModel, directory: Path | None) -> AnyDrafter:
    """The drafter that the policy names, with the weights in ``directory``; without a directory, the one without any.

    Raises:
        IncompatibleError: the weights do not fit the target.
    """
    settings = draft_settings(config)
    if directory is None:
        # It has no later blocks: the planner must not measure or explore any.
        return LookupDrafter(replace(settings, blocks=1), target.device, target.dtype)
    return BlockDrafter(load_network(target, directory), settings, graphs=config.engine.cuda_graphs)


def load_pair(
    model: str, drafter: Path | None, dtype: str, device: str, settings: DraftSettings, revision: str | None = None
) -> tuple[TargetModel, BlockDrafter | None]:
    """Loads a target and the drafter that belongs to it.

    Raises:
        IncompatibleError: one of them is missing or they do not fit.
    """
    target = load_target(model, number_format(dtype, device), device, revision)
    return target, None if drafter is None else BlockDrafter(load_network(target, drafter), settings)

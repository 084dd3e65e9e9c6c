"""Windows on disk for offline training: safetensors shards, tensors concatenated, the rest as JSON in the header."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from specblock.cuda_ext.sampling import SamplingParams
from specblock.drafter.window import TENSORS, Window

_FORMAT = "1"


def save_windows(path: Path, windows: Sequence[Window]) -> None:
    """Writes one shard atomically."""
    rows = []
    for w in windows:
        fields = {name: getattr(w, name) for name in Window.__dataclass_fields__ if name not in TENSORS}
        fields["sampling"] = asdict(w.sampling)
        rows.append({**fields, "sizes": [getattr(w, name).shape[0] for name in TENSORS]})
    tensors = {name: torch.cat([getattr(w, name) for w in windows]) for name in TENSORS}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"format": _FORMAT, "windows": json.dumps(rows)})
    partial.replace(path)


def load_windows(path: Path) -> list[Window]:
    """Reads one shard.

    Raises:
        ValueError: written by another version of this format.
    """
    with safe_open(path, framework="pt") as shard:
        metadata = shard.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path}: not a window shard of format {_FORMAT}: generate the data again")
        tensors = {name: shard.get_tensor(name) for name in TENSORS}
    windows = []
    at = dict.fromkeys(TENSORS, 0)
    for row in json.loads(metadata["windows"]):
        parts = {}
        for name, size in zip(TENSORS, row.pop("sizes"), strict=True):
            parts[name] = tensors[name][at[name] : at[name] + size]
            at[name] += size
        sampling = {**row.pop("sampling")}
        sampling["logit_bias"] = tuple((int(t), float(b)) for t, b in sampling["logit_bias"])
        row["accepted"] = tuple(row["accepted"])
        row["plans"] = tuple(tuple(plan) for plan in row.get("plans", ()))
        windows.append(Window(**row, **parts, sampling=SamplingParams(**sampling)))
    return windows

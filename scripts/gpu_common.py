"""What the measuring scripts share: the packages of this checkout, the middle of several times, a device to run on."""

from __future__ import annotations

import statistics
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


def import_from_checkout() -> None:
    """Makes ``specblock.*`` importable from the top-level folders."""
    package = types.ModuleType("specblock")
    package.__path__ = [str(ROOT)]
    sys.modules["specblock"] = package
    sys.path.insert(0, str(ROOT))


def middle(values: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    quarters = statistics.quantiles(values, n=4)
    return statistics.median(values), quarters[2] - quarters[0]


def device_is_missing(device: str, script: str) -> bool:
    """Says so if ``device`` is a GPU and there is none."""
    import torch

    missing = device == "cuda" and not torch.cuda.is_available()
    if missing:
        print(f"{script}: no CUDA device (torch.cuda.is_available() is False); --device cpu tries the script itself")
    return missing

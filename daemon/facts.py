"""What a measured figure depends on, printed beside it."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from specblock.cuda_ext.linear import rounds_rows
from specblock.cuda_ext.native import cuda_native_available, native_available

_BF16_UNITS = ("amx_bf16", "avx512_bf16")


def facts(device: str = "cpu", *, dtype: str, **settings: str | float) -> dict[str, str | float]:
    """Commit, versions, machine and ``settings`` of a measurement.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        dtype: number format the models ran in.
        settings: what else the figure depends on, such as the temperature.
    """
    here = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(here, capture_output=True, text=True, check=False).stdout.strip()
    known = torch.cpu.get_capabilities()
    on_gpu = device.startswith("cuda")
    served = dtype == "float32" or (dtype == "bfloat16" and rounds_rows())
    native = cuda_native_available("slot_attention") if on_gpu else served and native_available()
    own = "slot_attention" if on_gpu else "specblock_tree"
    units = "+".join(unit for unit in _BF16_UNITS if known.get(unit)) or "none"
    return {
        "commit": commit or "unknown",
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if on_gpu else str(known.get("cpu_name", "cpu")),
        "cpu_bfloat16": units,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "attention": own if native else "sdpa",
        "native_kernels": native,
        **settings,
    }

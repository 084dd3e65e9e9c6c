"""How much memory a configuration will need, and how much there is; an estimate made before anything is loaded."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specblock.daemon.config import DaemonConfig
from specblock.daemon.errors import DeviceError
from specblock.daemon.safetensors_header import TensorInfo

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
_RESIDENT_DRAFTERS = 2  # serving and previous
_TRAINING_BYTES_PER_PARAMETER = 16  # float32 master weights, gradients and two Adam moments
_BLENDING_BYTES_PER_PARAMETER = 8  # the weights it started from, and what is taken of both
_MIB = 2**20
MOST_ROWS = 96  # of a recorded forward; verifier/graphs.py, which takes PyTorch to import
_NVIDIA_SMI_DEADLINE_S = 20


def needs_bytes(
    config: DaemonConfig,
    target: Mapping[str, Any],
    target_tensors: Mapping[str, TensorInfo],
    drafter_tensors: Mapping[str, TensorInfo],
) -> dict[str, int]:
    """Bytes needed per device: weights, KV storage, resident drafters, windows, trainer and host services.

    Args:
        config: the whole policy.
        target: the target's ``config.json``.
        target_tensors: shapes of its weights.
        drafter_tensors: shapes of the drafter's weights; empty if it has none.

    Returns:
        Device ("cpu", "cuda:0") to bytes.
    """
    width = _width_bytes(config)
    drafter_elements = _elements(drafter_tensors)
    engine = _elements(target_tensors) * width + kv_bytes(config, target) + graph_bytes(config, target)
    engine += drafter_elements * width * _RESIDENT_DRAFTERS
    host = config.ray.object_store_memory_bytes
    if config.drafter.has_weights:  # else no windows are kept
        host += config.windows.budget_bytes
    if config.redis.url is None:
        host += config.redis.maxmemory_bytes
    needs = {"cpu": host}
    needs[_device(config.target.device)] = needs.get(_device(config.target.device), 0) + engine
    if config.adaptation.enabled:
        trainer = _device(config.trainer.device)
        blends = any(arm.blend < 1 for arm in config.adaptation.arms)
        per_parameter = _TRAINING_BYTES_PER_PARAMETER + blends * _BLENDING_BYTES_PER_PARAMETER
        needs[trainer] = needs.get(trainer, 0) + drafter_elements * per_parameter
    return needs


def kv_bytes(config: DaemonConfig, target: Mapping[str, Any]) -> int:
    """Bytes of the target's KV storage: every slot holds a full context and one draft tree."""
    heads = int(target.get("num_key_value_heads") or target.get("num_attention_heads") or 1)
    head_dim = int(target.get("head_dim") or int(target["hidden_size"]) // int(target["num_attention_heads"]))
    rows = config.target.max_context_tokens + config.drafter.node_budget + 1
    rows += MOST_ROWS if config.target.device.startswith("cuda") else 0  # where batches are filled up
    layers = int(target["num_hidden_layers"])
    return 2 * layers * config.engine.slots * heads * head_dim * rows * _width_bytes(config)


def graph_bytes(config: DaemonConfig, target: Mapping[str, Any]) -> int:
    """Bytes that recorded forwards hold on to: logits and features of the largest, once as results, once in between."""
    if not config.engine.cuda_graphs or not config.target.device.startswith("cuda"):
        return 0
    row = int(target["vocab_size"]) + 3 * int(target["hidden_size"])
    return 2 * config.engine.slots * MOST_ROWS * row * _width_bytes(config)


def free_bytes(device: str) -> int:
    """Memory that is free on "cpu" or "cuda:N" now.

    Raises:
        DeviceError: no such device.
    """
    if device == "cpu":
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        raise DeviceError("/proc/meminfo does not say how much memory is available")
    return _free_gpu_bytes(device)


def _free_gpu_bytes(device: str) -> int:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        raise DeviceError(f"{device}: no NVIDIA driver here (nvidia-smi is missing)")
    index = device.partition(":")[2] or "0"
    query = [tool, "--query-gpu=memory.free", "--format=csv,noheader,nounits", f"--id={index}"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=_NVIDIA_SMI_DEADLINE_S, check=False)
    except subprocess.TimeoutExpired:
        raise DeviceError(f"{device}: nvidia-smi gives no answer in {_NVIDIA_SMI_DEADLINE_S} s") from None
    if found.returncode != 0 or not found.stdout.strip().isdecimal():
        raise DeviceError(f"{device}: {(found.stderr or found.stdout).strip() or 'nvidia-smi gives no answer'}")
    return int(found.stdout) * _MIB


def _width_bytes(config: DaemonConfig) -> int:
    """Bytes per number. On CPUs bfloat16 may be what is multiplied, while tensors are float32."""
    name = config.target.dtype
    return DTYPE_BYTES["float32" if name == "bfloat16" and _device(config.target.device) == "cpu" else name]


def _device(name: str) -> str:
    return "cuda:0" if name == "cuda" else name


def _elements(tensors: Mapping[str, TensorInfo]) -> int:
    return sum(tensor.num_elements for tensor in tensors.values())

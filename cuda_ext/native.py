"""The native library: compiled at install where a compiler is, missing otherwise. Without it the references run."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import torch
from torch import Tensor

_LIBRARY = "_C.abi3.so"
log = logging.getLogger(__name__)


@functools.cache
def native_available(library: Path = Path(__file__).with_name(_LIBRARY)) -> bool:
    """Loads the native operations on the first call; says once why they are missing, if they are.

    They register with PyTorch as ``torch.ops.specblock.*``, so loading is for the whole process.
    """
    if not library.exists():
        log.warning("native operations were not built (no C++ compiler at install time?): using the slower references")
        return False
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError as error:
        log.warning("native operations cannot be loaded (%s): using the slower references", str(error).splitlines()[0])
        return False
    for name, shape in (
        ("packed_linear", _packed_linear_shape),
        ("tree_attention", _tree_attention_shape),
        ("rms_norm", _rms_norm_shape),
        ("philox_uniform", _philox_uniform_shape),
    ):
        torch.library.register_fake(f"specblock::{name}", shape)
    return True


def serves(*tensors: Tensor) -> bool:
    """Whether native operations take these: float32 on a CPU, no gradient wanted, and the library is there."""
    return (
        tensors[0].is_cpu
        and not torch.is_grad_enabled()
        and all(t.dtype == torch.float32 for t in tensors)
        and native_available()
    )


def _packed_linear_shape(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _tree_attention_shape(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    batch, heads, rows, size = query.shape
    return query.new_empty(batch, rows, heads, size)


def _rms_norm_shape(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


def _philox_uniform_shape(seed: Tensor, choice: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    return seed.new_empty(seed.shape[0], vocab_size, dtype=torch.float64)

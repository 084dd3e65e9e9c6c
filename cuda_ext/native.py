"""The native library: compiled at install where a compiler is, missing otherwise. Without it the references run."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

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
    shapes = (
        ("packed_linear", _packed_linear_shape),
        ("tree_attention", _tree_attention_shape),
        ("swiglu", _swiglu_shape),
        ("rotary_linear", _rotary_linear_shape),
        ("rms_norm", _rms_norm_shape),
        ("philox_uniform", _philox_uniform_shape),
        ("draft_top", _draft_top_shape),
        ("choose", _choose_shape),
        ("expand_chain", _expand_chain_shape),
        ("follow_chain", _follow_chain_shape),
        ("grow_tree", _grow_tree_shape),
        ("ancestor_mask", _ancestor_mask_shape),
        ("rank_of_choice", _rank_of_choice_shape),
        ("accept_walk", _accept_walk_shape),
        ("commit_rows", _commit_rows_shape),
        ("attention_inputs", _attention_inputs_shape),
        ("layer_rest", _layer_rest_shape),
        ("slot_layer", _slot_layer_shape),
        ("slot_layers", _slot_layers_shape),
        ("slot_inputs", _slot_inputs_shape),
        ("draft_head", _draft_head_shape),
        ("slot_attention", _slot_attention_shape),
        ("add_rms_norm", _add_rms_norm_shape),
        ("rotary_store", _rotary_store_shape),
        ("rotary_heads", _rotary_heads_shape),
        ("gated", _gated_shape),
    )
    missing = [name for name, _ in shapes if not hasattr(torch.ops.specblock, name)]
    if missing:
        log.warning(
            "native operations are of older sources (no %s): install again; using the slower references", missing
        )
        return False
    for name, shape in shapes:
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


@functools.cache
def cuda_native_available(name: str) -> bool:
    """Whether the library is loaded and has a CUDA kernel of ``specblock::<name>``; says once if it has none."""
    if not native_available():
        return False
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"specblock::{name}", "CUDA"):
        return not torch.cuda.is_available() or _cuda_kernels_run()
    _say_cuda_is_missing()
    return False


@functools.cache
def _cuda_kernels_run() -> bool:
    """Whether a kernel runs at all: a device may be older than what was compiled, a driver older than the toolkit."""
    try:
        one = torch.zeros(1, dtype=torch.int64, device="cuda")
        torch.ops.specblock.philox_uniform(one, one, one, 1).item()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        log.warning("CUDA kernels do not run on this device (%s): using the slower references", reason)
        return False
    return True


@functools.cache
def _say_cuda_is_missing() -> None:
    log.warning("the native library has no CUDA kernels (no nvcc at install time?): using the slower references")


def serves_cuda(name: str, *tensors: Tensor) -> bool:
    """Whether the CUDA kernel of ``specblock::<name>`` can take these: all on one device, no gradient wanted."""
    return (
        tensors[0].is_cuda
        and not torch.is_grad_enabled()
        and all(t.device == tensors[0].device for t in tensors)
        and cuda_native_available(name)
    )


def has_kernel(name: str, tensor: Tensor) -> bool:
    """Whether ``specblock::<name>`` runs where ``tensor`` is. For operations whose result nothing is derived from."""
    return native_available() if tensor.is_cpu else tensor.is_cuda and cuda_native_available(name)


def _packed_linear_shape(x: Tensor, packed: Tensor, out_features: int, coarse: bool = False) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _swiglu_shape(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, inner: int, out_features: int, coarse: bool = False
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _rotary_linear_shape(x: Tensor, packed: Tensor, out_features: int, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _tree_attention_shape(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    batch, heads, rows, size = query.shape
    return query.new_empty(batch, rows, heads, size)


def _slot_attention_shape(query: Tensor, *others: Any) -> Tensor:
    batch, heads, rows, size = query.shape
    return query.new_empty(batch, rows, heads, size)


def _rms_norm_shape(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


def _philox_uniform_shape(seed: Tensor, choice: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    return seed.new_empty(seed.shape[0], vocab_size, dtype=torch.float64)


def _draft_top_shape(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, width, num_top = logits.shape[0], others[-2], others[-1]
    index = logits.new_empty(rows, width, dtype=torch.int64)
    return index, logits.new_empty(rows, width), logits.new_empty(rows, num_top)


def _choose_shape(logits: Tensor, *others: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def _expand_chain_shape(token: Tensor, *others: object) -> tuple[Tensor, ...]:
    flat = token.flatten(1)
    integers = tuple(torch.empty_like(flat) for _ in range(5))
    return *integers, flat.new_empty(flat.shape, dtype=torch.float32), flat.new_empty(flat.shape, dtype=torch.bool)


def _follow_chain_shape(token: Tensor, log_prob: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(token), torch.empty_like(log_prob)


def _grow_tree_shape(root_token: Tensor, token: Tensor, *others: Any) -> tuple[Tensor, ...]:
    batch, num_raw = token.shape
    rows = min(others[-2], num_raw) + 1
    integers = tuple(token.new_empty(batch, rows) for _ in range(5))
    score, size = token.new_empty(batch, rows, dtype=torch.float32), token.new_empty(batch)
    return *integers, score, size, torch.empty_like(token)


def _ancestor_mask_shape(parent: Tensor) -> Tensor:
    return parent.new_empty(*parent.shape, parent.shape[1], dtype=torch.bool)


def _rank_of_choice_shape(parent_row: Tensor, token: Tensor, rank: Tensor, row: Tensor, *others: object) -> Tensor:
    return torch.empty_like(row)


def _accept_walk_shape(
    logits: Tensor, token: Tensor, parent: Tensor, noise: Tensor, noise_row: Tensor, *others: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(noise_row), torch.empty_like(noise_row), noise_row.new_empty(noise_row.shape[0])


def _commit_rows_shape(storage: Tensor, *others: Tensor) -> None:
    return None


def _attention_inputs_shape(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    query_out, key_out = others[5], others[6]
    return tuple(x.new_empty(*x.shape[:-1], size) for size in (query_out, key_out, key_out))  # type: ignore[return-value]


def _layer_rest_shape(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x)


def _slot_layer_shape(x: Tensor, residual: Tensor | None, *others: Any) -> Tensor:
    asking, stream = others[17], x if residual is None else residual
    return torch.empty_like(stream) if asking is None else stream.new_empty(*asking.shape, stream.shape[-1])


def _slot_layers_shape(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    kept, asking, size = others[17], others[20], x.shape[-1]
    rows = x.shape[:-1] if asking is None else asking.shape
    return x.new_empty(*rows, size), x.new_empty(*x.shape[:-1], len(kept) * size)


def _slot_inputs_shape(x: Tensor, *others: Any) -> Tensor:
    token, slots = others[3], others[8]
    return x.new_empty(*token.shape, *slots.shape)


def _draft_head_shape(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width, num_top = hidden.shape[0], others[14], others[15]
    index = hidden.new_empty(rows, width, dtype=torch.int64)
    return torch.empty_like(hidden), index, hidden.new_empty(rows, width), hidden.new_empty(rows, num_top)


def _add_rms_norm_shape(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _rotary_store_shape(qkv: Tensor, cos: Tensor, *others: Any) -> Tensor:
    batch, rows, size = qkv.shape
    head_dim, kv_heads = cos.shape[-1], others[4].shape[1]
    return qkv.new_empty(batch, rows, size // head_dim - 2 * kv_heads, head_dim)


def _rotary_heads_shape(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, rows, size = x.shape
    return x.new_empty(batch, rows, size // cos.shape[-1], cos.shape[-1])


def _gated_shape(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)

"""The header of a safetensors file: names, shapes and sizes without reading a weight or importing torch."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

_MAX_HEADER_BYTES = 100 << 20
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and stored type (as in ``BF16``) of one tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Reads what a file holds and checks that it is complete.

    Raises:
        ValueError: not a safetensors file, or shorter than its header says; the message names the file.
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        start = stream.read(_LENGTH.size)
        if len(start) < _LENGTH.size:
            raise ValueError(f"{path}: not a safetensors file")
        (length,) = _LENGTH.unpack(start)
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"{path}: not a safetensors file")
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {name: TensorInfo(tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise ValueError(f"{path}: damaged safetensors header") from None
    expected, found = _LENGTH.size + length + end, path.stat().st_size
    if expected != found:
        raise ValueError(f"{path}: {found} bytes, its header says {expected}")
    return tensors

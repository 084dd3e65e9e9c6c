"""Numbers from the host to a device without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def on_device(values: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.tensor(values, device=device)``; on a CUDA device the copy is queued like any other operation.

    Pageable memory would be copied at once, behind everything that is queued: one such tensor costs a decode cycle all
    overlap of host and device. The allocator of pinned memory keeps a block until its copy is through.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)

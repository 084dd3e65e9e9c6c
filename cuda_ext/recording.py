"""Recording CUDA graphs: one memory pool, and batches in few sizes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs an action once or more and returns what repeats it, reading and writing the same memory."""


class CudaRecorder:
    """Records CUDA graphs that share a memory pool; they must not run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, action: Callable[[], None]) -> Callable[[], None]:
        """Runs the action twice to let libraries set themselves up, then records it."""
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                self._pool = torch.cuda.graph_pool_handle()
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                action()
                action()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            collecting = gc.isenabled()
            gc.disable()  # what it would free in between, another graph perhaps, could break this one
            try:
                # Other threads (a trainer, say) may go on calling CUDA as they like.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    action()
            finally:
                if collecting:
                    gc.enable()
                torch.cuda.set_stream(current)  # a capture that failed leaves its own
            return graph.replay


def batch_buckets(num_slots: int) -> tuple[int, ...]:
    """Powers of two below the number of slots, and that number."""
    powers = [1 << power for power in range(num_slots.bit_length()) if 1 << power < num_slots]
    return (*powers, num_slots)


def root_cause(error: BaseException) -> str:
    """One line about what broke first: ending a broken recording raises again, and says less."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip() or repr(error)).splitlines()[0]

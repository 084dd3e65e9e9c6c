"""CUDA graphs of a drafter's blocks, recorded by block and sizes.

A block launches a few hundred kernels for some microseconds of work each: the host is what it waits for. Weights are
swapped in place and cached rows are addressed by data, so a graph outlives swaps and requests.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from specblock.cuda_ext.recording import CudaRecorder, Recorder, Recording, Recordings, batch_buckets

_MOST_GRAPHS = 192
Tensors = tuple[Tensor, ...]
Body = Callable[[Tensors], Tensors]


class BlockGraphs:
    """The recorded blocks over one cache, each recorded when it is first needed."""

    def __init__(self, device: torch.device, num_slots: int, record: Recorder | None = None) -> None:
        """Args:
        device: of the drafter.
        num_slots: most requests of a block.
        record: replaces CUDA's recording, for tests.
        """
        self._device, self._batches = device, batch_buckets(num_slots)
        self._recordings = Recordings[tuple[Hashable, int]](record or CudaRecorder(device), _MOST_GRAPHS)

    def __len__(self) -> int:
        """Graphs recorded."""
        return len(self._recordings.sizes)

    @property
    def failures(self) -> int:
        """Blocks that could not be recorded."""
        return self._recordings.failures

    def run(self, key: Hashable, body: Body, inputs: Tensors) -> Tensors | None:
        """What ``body(inputs)`` returns, valid until the same key runs again; None if there is no graph.

        Args:
            key: everything that ``body`` depends on besides the inputs, their batch size excluded.
            body: what to record, if this key and batch size have not been.
            inputs: requests are the first dimension of all; a batch is filled up with zeros.
        """
        batch = inputs[0].shape[0]
        filled = next((size for size in self._batches if size >= batch), 0)

        def own() -> Tensors:
            return tuple(torch.zeros(filled, *x.shape[1:], dtype=x.dtype, device=self._device) for x in inputs)

        recording = self._recordings.of((key, filled), own) if filled else None
        if recording is None:
            return None
        for mine, given in zip(recording.inputs, inputs, strict=True):
            mine[:batch].copy_(given)
            if batch < filled:
                mine[batch:].zero_()
        if not self._recordings.run(recording, lambda: _leave(recording, body), "a drafter's block"):
            return None
        return tuple(output[:batch] for output in recording.outputs)


def _leave(recording: Recording, body: Body) -> None:
    """Runs the block over the recording's inputs and leaves what it returns in its outputs."""
    found = body(recording.inputs)
    if not recording.outputs:  # outside of the pool, which the next graph uses again
        with torch.inference_mode(False):
            recording.outputs = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in found)
    for kept, output in zip(recording.outputs, found, strict=True):
        kept.copy_(output)

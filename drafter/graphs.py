"""CUDA graphs of a drafter's blocks, recorded by block and sizes.

A block launches a few hundred kernels for some microseconds of work each: the host is what it waits for. Weights are
swapped in place and cached rows are addressed by data, so a graph outlives swaps and requests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from specblock.cuda_ext.recording import CudaRecorder, Recorder, batch_buckets, root_cause

log = logging.getLogger(__name__)

_MOST_GRAPHS = 192
Tensors = tuple[Tensor, ...]
Body = Callable[[Tensors], Tensors]


@dataclass(slots=True)
class _Recording:
    inputs: Tensors
    replay: Callable[[], None] | None = None
    outputs: Tensors = ()


class BlockGraphs:
    """The recorded blocks over one cache, each recorded when it is first needed.

    Attributes:
        failures: blocks that could not be recorded; after the first, no more are tried.
    """

    def __init__(self, device: torch.device, num_slots: int, record: Recorder | None = None) -> None:
        """Args:
        device: of the drafter.
        num_slots: most requests of a block.
        record: replaces CUDA's recording, for tests.
        """
        self.failures = 0
        self._device, self._batches = device, batch_buckets(num_slots)
        self._record = record or CudaRecorder(device)
        self._recordings: dict[Hashable, _Recording] = {}

    def __len__(self) -> int:
        """Graphs recorded."""
        return sum(recording.replay is not None for recording in self._recordings.values())

    def run(self, key: Hashable, body: Body, inputs: Tensors) -> Tensors | None:
        """What ``body(inputs)`` returns, valid until the same key runs again; None if there is no graph.

        Args:
            key: everything that ``body`` depends on besides the inputs, their batch size excluded.
            body: what to record, if this key and batch size have not been.
            inputs: requests are the first dimension of all; a batch is filled up with zeros.
        """
        batch = inputs[0].shape[0]
        filled = next((size for size in self._batches if size >= batch), 0)
        place = (key, filled)
        recording = self._recordings.get(place)
        if recording is None:
            if self.failures or not filled or len(self._recordings) >= _MOST_GRAPHS:
                return None
            # Tensors born in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                own = tuple(torch.zeros(filled, *x.shape[1:], dtype=x.dtype, device=self._device) for x in inputs)
            recording = self._recordings[place] = _Recording(own)
        elif recording.replay is None:
            return None
        for mine, given in zip(recording.inputs, inputs, strict=True):
            mine[:batch].copy_(given)
            if batch < filled:
                mine[batch:].zero_()
        if recording.replay is None:
            self._make(recording, body, key)
            if recording.replay is None:
                return None
        recording.replay()
        return tuple(output[:batch] for output in recording.outputs)

    def _make(self, recording: _Recording, body: Body, key: Hashable) -> None:
        def action() -> None:
            found = body(recording.inputs)
            if not recording.outputs:  # outside of the pool, which the next graph uses again
                with torch.inference_mode(False):
                    recording.outputs = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in found)
            for kept, output in zip(recording.outputs, found, strict=True):
                kept.copy_(output)

        try:
            recording.replay = self._record(action)
        except Exception as error:  # whatever it was: there is a way without graphs
            self.failures += 1
            log.warning("no CUDA graph for a drafter's block, going on without more of them: %s", root_cause(error))

"""CUDA graphs of the target's forward, recorded by number of requests and rows.

A forward of few rows launches some thousand kernels that each take microseconds; replayed as one graph, the device no
longer waits for the host. Lengths and slots are data, so a graph serves prefixes of every length.

A batch is filled up to the next recorded size. Rows that fill up see only themselves and are written behind the real
ones, which nobody reads before they are overwritten. Requests that fill up belong to slot 0 with an empty prefix, and
their rows are written behind the capacity of that slot, where every slot has room for the largest number of rows.

Legend: B requests, R rows per request, F fused feature size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from specblock.cuda_ext.recording import CudaRecorder, Recorder, batch_buckets, root_cause

log = logging.getLogger(__name__)

ROW_BUCKETS = (1, 8, 16, 32, 64, 96)
_MOST_GRAPHS = 64
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""tokens int64 [B, R], depth int64 [B, R], visible bool [B, R, R], numbers int64 [3, B]; see ``SlotRows``."""
Body = Callable[[Inputs], tuple[Tensor, Tensor]]
"""What is recorded: inputs -> logits [B, R, V], features [B, R, F]."""


@dataclass(slots=True)
class _Recording:
    inputs: Inputs
    replay: Callable[[], None] | None = None
    logits: Tensor | None = None
    features: Tensor | None = None


class ForwardGraphs:
    """The recorded forwards over one cache, each recorded when it is first needed.

    All of them write their results into the same two buffers, so results last until the next forward, and share one
    pool for everything between.

    Attributes:
        failures: sizes that could not be recorded; after the first, no more are tried.
    """

    def __init__(
        self, device: torch.device, num_slots: int, scratch_position: int, record: Recorder | None = None
    ) -> None:
        """Args:
        device: of the model.
        num_slots: most requests of a forward.
        scratch_position: position in a slot from which requests that fill up a batch are written.
        record: replaces CUDA's recording, for tests.
        """
        self.failures = 0
        self._device, self._scratch = device, scratch_position
        self._batches = batch_buckets(num_slots)
        self._record = record or CudaRecorder(device)
        self._recordings: dict[tuple[int, int], _Recording] = {}
        self._results: tuple[Tensor, Tensor] | None = None

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(requests, rows) of every graph, in the order of recording."""
        return tuple(size for size, recording in self._recordings.items() if recording.replay is not None)

    def sizes_up_to(self, most_rows: int) -> list[tuple[int, int]]:
        """(requests, rows) of the graphs that serve any number of requests with up to so many rows each."""
        needed = [rows for below, rows in zip((0, *ROW_BUCKETS), ROW_BUCKETS, strict=False) if below < most_rows]
        return [(batch, rows) for batch in reversed(self._batches) for rows in reversed(needed)]

    def run(
        self,
        body: Body,
        slots: Sequence[int],
        lengths: Sequence[int],
        tokens: Tensor,
        depth: Tensor,
        visible: Tensor,
    ) -> tuple[Tensor, Tensor] | None:
        """Logits [B, R, V] and features [B, R, F], valid until the next call; None if there is no graph.

        Args:
            body: what to record, if this size has not been.
            slots: slot of each request.
            lengths: committed length of each.
            tokens: int64 [B, R].
            depth: int64 [B, R].
            visible: bool [B, R, R], own row included.
        """
        batch, rows = tokens.shape
        size = next((b for b in self._batches if b >= batch), 0), next((r for r in ROW_BUCKETS if r >= rows), 0)
        recording = self._recordings.get(size)
        if recording is None:
            if self.failures or not all(size) or len(self._recordings) >= _MOST_GRAPHS:
                return None
            recording = self._recordings[size] = _Recording(self._buffers(*size))
        elif recording.replay is None:
            return None
        self._fill(recording.inputs, slots, lengths, tokens, depth, visible)
        if recording.replay is None:
            self._make(recording, body, size)
            if recording.replay is None:
                return None
        recording.replay()
        assert recording.logits is not None and recording.features is not None
        return recording.logits[:batch, :rows], recording.features[:batch, :rows]

    def _buffers(self, batch: int, rows: int) -> Inputs:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        # Tensors born in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            visible = zeros(batch, rows, rows, dtype=torch.bool)
            return zeros(batch, rows), zeros(batch, rows), visible, zeros(3, batch)

    def _fill(
        self,
        inputs: Inputs,
        slots: Sequence[int],
        lengths: Sequence[int],
        tokens: Tensor,
        depth: Tensor,
        visible: Tensor,
    ) -> None:
        (batch, rows), (all_batch, all_rows) = tokens.shape, inputs[0].shape
        more, below = all_batch - batch, all_rows - rows
        filling = [0] * more
        numbers = [[*slots, *filling], [*lengths, *filling], [*lengths, *[self._scratch] * more]]
        inputs[3].copy_(torch.tensor(numbers, pin_memory=self._device.type == "cuda"), non_blocking=True)
        if more or below:
            tokens, depth = (F.pad(x, (0, below, 0, more)) for x in (tokens, depth))
            visible = F.pad(visible, (0, below, 0, below, 0, more))
            visible = visible | torch.eye(all_rows, dtype=torch.bool, device=self._device)
        inputs[0].copy_(tokens)
        inputs[1].copy_(depth)
        inputs[2].copy_(visible)

    def _make(self, recording: _Recording, body: Body, size: tuple[int, int]) -> None:
        """Records; on failure the size, and every one not yet recorded, is left to the eager way."""

        def action() -> None:
            logits, features = body(recording.inputs)
            recording.logits, recording.features = self._result_views(logits, features)
            recording.logits.copy_(logits)
            recording.features.copy_(features)

        try:
            recording.replay = self._record(action)
        except torch.OutOfMemoryError as error:  # a smaller size may fit
            log.warning("no memory for a CUDA graph of %d requests of %d rows: %s", *size, root_cause(error))
        except Exception as error:  # whatever it was: there is a way without graphs
            self.failures += 1
            log.warning(
                "no CUDA graph for %d requests of %d rows, going on without more graphs: %s", *size, root_cause(error)
            )

    def _result_views(self, logits: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Where a graph leaves its results: the beginning of buffers that fit the largest one."""
        if self._results is None:
            most = self._batches[-1] * ROW_BUCKETS[-1]
            with torch.inference_mode(False):
                self._results = (
                    torch.zeros(most * logits.shape[-1], dtype=logits.dtype, device=logits.device),
                    torch.zeros(most * features.shape[-1], dtype=features.dtype, device=features.device),
                )
        whole = self._results
        return whole[0][: logits.numel()].view(logits.shape), whole[1][: features.numel()].view(features.shape)

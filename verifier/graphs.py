"""CUDA graphs of the target's forward, recorded by number of requests and rows.

A forward of few rows launches some thousand kernels that each take microseconds; replayed as one graph, the device no
longer waits for the host. Lengths and slots are data, so a graph serves prefixes of every length.

A batch is filled up to the next recorded size. Rows that fill up see only themselves and are written behind the real
ones, which nobody reads before they are overwritten. Requests that fill up belong to slot 0 with an empty prefix, and
their rows are written behind the capacity of that slot, where every slot has room for the largest number of rows.

Legend: B requests, R rows per request, F fused feature size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from specblock.cuda_ext.recording import CudaRecorder, Recorder, Recording, Recordings, batch_buckets

ROW_BUCKETS = (1, 8, 16, 32, 64, 96)
_MOST_GRAPHS = 64
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""tokens int64 [B, R], depth int64 [B, R], visible bool [B, R, R], numbers int64 [3, B]; see ``SlotRows``."""
Body = Callable[[Inputs], tuple[Tensor, Tensor]]
"""What is recorded: inputs -> logits [B, R, V], features [B, R, F]."""


class ForwardGraphs:
    """The recorded forwards over one cache, each recorded when it is first needed.

    All of them write their results into the same two buffers, so results last until the next forward, and share one
    pool for everything between.
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
        self._device, self._scratch = device, scratch_position
        self._batches = batch_buckets(num_slots)
        self._recordings = Recordings[tuple[int, int]](record or CudaRecorder(device), _MOST_GRAPHS)
        self._results: tuple[Tensor, Tensor] | None = None

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(requests, rows) of every graph, in the order of recording."""
        return self._recordings.sizes

    @property
    def failures(self) -> int:
        """Sizes that could not be recorded."""
        return self._recordings.failures

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
        recording = self._recordings.of(size, lambda: self._buffers(*size)) if all(size) else None
        if recording is None:
            return None
        self._fill(cast(Inputs, recording.inputs), slots, lengths, tokens, depth, visible)
        what = f"{size[0]} requests of {size[1]} rows"
        if not self._recordings.run(recording, lambda: self._leave(recording, body), what):
            return None
        logits, features = recording.outputs
        return logits[:batch, :rows], features[:batch, :rows]

    def _buffers(self, batch: int, rows: int) -> Inputs:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

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

    def _leave(self, recording: Recording, body: Body) -> None:
        """Runs the forward over the recording's inputs and leaves its results where all forwards do."""
        logits, features = body(cast(Inputs, recording.inputs))
        recording.outputs = self._result_views(logits, features)
        for kept, output in zip(recording.outputs, (logits, features), strict=True):
            kept.copy_(output)

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

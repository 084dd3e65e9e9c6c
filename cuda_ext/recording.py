"""Recording CUDA graphs: one memory pool, batches in few sizes, and what is left to the eager way."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Size = TypeVar("Size", bound=Hashable)
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


@dataclass(slots=True)
class Recording:
    """The memory that one graph reads and writes, and what repeats it: None before, and if recording failed."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...] = ()
    replay: Callable[[], None] | None = None


class Recordings(Generic[Size]):
    """Graphs by size, each recorded when it is first needed.

    Attributes:
        failures: sizes that could not be recorded; after the first, no more are tried. A size for which there was no
            memory is not counted: a smaller one may find some.
    """

    def __init__(self, record: Recorder, most: int) -> None:
        """Args:
        record: records.
        most: sizes at most.
        """
        self.failures = 0
        self._record, self._most = record, most
        self._found: dict[Size, Recording] = {}

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Of every graph, in the order of recording."""
        return tuple(size for size, recording in self._found.items() if recording.replay is not None)

    def of(self, size: Size, inputs: Callable[[], tuple[Tensor, ...]]) -> Recording | None:
        """The graph of a size, to be recorded if there is none yet; None if it is left to the eager way.

        Args:
            size: everything that the graph depends on besides its inputs.
            inputs: makes what it will read.
        """
        if size in self._found:
            recording = self._found[size]
            return None if recording.replay is None else recording
        if self.failures or len(self._found) >= self._most:
            return None
        # Tensors born in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            return self._found.setdefault(size, Recording(inputs()))

    def run(self, recording: Recording, action: Callable[[], None], what: str) -> bool:
        """Runs the graph, recording ``action`` first if it has not been; False if that fails.

        Args:
            recording: its inputs are filled.
            action: reads the inputs and leaves the outputs.
            what: for the log.
        """
        if recording.replay is None:
            try:
                recording.replay = self._record(action)
            except torch.OutOfMemoryError as error:
                log.warning("no memory for a CUDA graph of %s: %s", what, root_cause(error))
                return False
            except Exception as error:  # whatever it was: there is a way without graphs
                self.failures += 1
                log.warning("no CUDA graph for %s, going on without more of them: %s", what, root_cause(error))
                return False
        recording.replay()
        return True


def batch_buckets(num_slots: int) -> tuple[int, ...]:
    """Powers of two below the number of slots, and that number."""
    powers = [1 << power for power in range(num_slots.bit_length()) if 1 << power < num_slots]
    return (*powers, num_slots)


def root_cause(error: BaseException) -> str:
    """One line about what broke first: ending a broken recording raises again, and says less."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip() or repr(error)).splitlines()[0]


def kept_in_place(old: Tensor, new: Tensor) -> Tensor:
    """``new``, in the memory of ``old`` where it fits: recorded graphs read from there."""
    if old.shape != new.shape or old.device != new.device or old.is_inference():
        return new
    return old.copy_(new)

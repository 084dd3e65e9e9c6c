"""What the decode loop hands on: acceptance events (scalars) and training windows. Never waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from specblock.bandit.events import AcceptanceEvent
from specblock.daemon.engine import Listener
from specblock.daemon.request import RequestState
from specblock.daemon.windows import WindowStore


class EventSink(Protocol):
    """Where events go; ``offer`` returns at once and counts what it has to drop."""

    def offer(self, event: AcceptanceEvent) -> None:
        """Takes one event."""


def sampling_class(temperature: float) -> str:
    """Requests of one class are compared with each other: acceptance depends on temperature."""
    if temperature == 0:
        return "greedy"
    for upper, name in ((0.5, "t0-0.5"), (0.9, "t0.5-0.9"), (1.1, "t0.9-1.1")):
        if temperature <= upper:
            return name
    return "t1.1+"


def band(value: int) -> str:
    """Power-of-two band that holds ``value``: 1, 2, 4, 8, ..."""
    return str(1 << max(0, value - 1).bit_length())


class Feedback(Listener):
    """Turns segments into events and finished requests into windows."""

    def __init__(
        self,
        sink: EventSink | None,
        windows: WindowStore,
        engine_name: str,
        clock: Callable[[], float],
        running: Callable[[], int],
    ) -> None:
        self._sink, self._windows, self._name = sink, windows, engine_name
        self._clock, self._running = clock, running

    def segment(self, state: RequestState, last: bool) -> None:
        """Offers one event for the cycles since the last one."""
        counts = state.segment
        if self._sink is None or counts.cycles == 0 or not state.speculative:
            return
        self._sink.offer(
            AcceptanceEvent(
                time_s=self._clock(),
                request_id=state.request.request_id,
                engine=self._name,
                drafter_version=state.versions[-1],
                tenant=state.request.tenant,
                domain=state.request.domain,
                sampling_class=sampling_class(state.request.sampling.temperature),
                batch_band=band(self._running()),
                context_band=band(len(state.tokens)),
                cycles=counts.cycles,
                committed_tokens=counts.committed,
                accepted_histogram=tuple(counts.histogram),
                rank_histogram=tuple(counts.ranks),
                draft_s=counts.draft_s,
                verify_s=counts.verify_s,
                other_s=counts.other_s,
                draft_nodes=counts.draft_nodes,
                flagged=state.flagged or len(set(state.segment_versions)) > 1,
                last=last,
            )
        )

    def finished(self, state: RequestState, reason: str) -> None:
        """Keeps the conversation unless its tenant opted out or it was cut short."""
        if reason in ("abort", "error"):
            return
        now = self._clock()
        # The gateway numbers the answers of one HTTP request: they share prompts, so they share a side of the split.
        together = state.request.request_id.rpartition("-")[0] or state.request.request_id
        heldout = self._windows.is_heldout(together)
        window = state.window(now, heldout, self._windows.limits.max_window_tokens)
        if window is not None:
            self._windows.add(window)

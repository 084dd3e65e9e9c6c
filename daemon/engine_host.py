"""An engine with a thread of its own: requests in, coalesced chunks out, weights swapped between cycles.

Everything a caller does returns at once; only ``next_chunks`` waits, for output.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specblock.daemon.engine import Engine
from specblock.daemon.messages import EngineStatus, GenerationRequest, RequestStats, TokenChunk
from specblock.daemon.planner_types import PlannerStatus
from specblock.daemon.request import RequestState
from specblock.daemon.windows import WindowStore
from specblock.drafter.checkpoint import load_weights
from specblock.drafter.network import DraftNetwork

log = logging.getLogger(__name__)

_MOST_FAILURES = 3
"""Failed cycles in a row after which the engine counts as broken; one alone may be the fault of one request."""
_ABOVE_BACKBONE = ("lm_head.", "token_bias.", "token_pairs.", "norm.", "rank_head.", "t2d", "d2t")


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapResult:
    """Outcome of a swap: how long decoding stood still, and whether running requests kept valid drafter rows."""

    version: str
    stall_s: float
    rows_stay_valid: bool


class EngineHost:
    """Owns the decode thread."""

    def __init__(self, engine: Engine, windows: WindowStore, stream_interval_s: float, max_waiting: int) -> None:
        self.engine, self.windows = engine, windows
        self._interval_s, self._max_waiting = stream_interval_s, max_waiting
        self._changed = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._output: list[TokenChunk] = []
        self._last_delivery = 0.0
        self._phase, self._detail = "ready", ""
        self._finished: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()
        self._per_position: list[int] = []
        self._swaps = 0
        self._sizes: PlannerStatus | None = None  # written by the decode thread, which owns the planner
        self._failures = 0  # cycles in a row that raised
        self._swapping = threading.Lock()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> None:
        """Hands a request to the decode thread; a request that cannot run answers with an error chunk."""
        self._post(lambda: self._accept(request))

    def cancel(self, request_id: str) -> None:
        """Cancels a request wherever it is."""

        def drop() -> None:
            chunk = self.engine.cancel(request_id)
            if chunk is not None:
                self._emit([chunk])

        self._post(drop)

    def next_chunks(self, timeout_s: float) -> list[TokenChunk]:
        """Chunks of all requests since the last call, coalesced to the stream interval; [] after ``timeout_s``."""
        with self._changed:
            self._changed.wait_for(lambda: self._output or self._stopping, timeout_s)
            wait = self._last_delivery + self._interval_s - time.monotonic()
            if self._output and wait > 0:
                self._changed.wait_for(lambda: self._stopping, wait)
            chunks, self._output = self._output, []
            self._last_delivery = time.monotonic()
            return chunks

    def swap(self, version: str, weights: dict[str, Tensor], timeout_s: float = 60.0) -> SwapResult:
        """Puts ``weights`` in place between two cycles and waits until they serve.

        Raises:
            ValueError: the weights do not fit; the old ones stay.
            TimeoutError: the decode thread did not get to it, and will not.
        """
        done: list[SwapResult | Exception] = []
        event = threading.Event()
        ticket = threading.Lock()  # taken once: by the decode thread that starts, or by the caller who gives up

        def apply() -> bool:
            if not ticket.acquire(blocking=False):
                return True
            begin = time.perf_counter()
            valid = True
            try:
                valid = self._load(version, weights)
                done.append(SwapResult(version=version, stall_s=time.perf_counter() - begin, rows_stay_valid=valid))
            except Exception as error:  # the caller's to handle; running requests have nothing to do with it
                done.append(error)
            finally:
                event.set()
            return valid

        weights = self._near(weights)
        late = TimeoutError("the decode loop did not reach the swap in time")
        if not self._swapping.acquire(timeout=timeout_s):  # the engine holds one swap: a second would replace it
            raise late
        try:
            self._post(lambda: self.engine.swap_between_cycles(apply))
            if not event.wait(timeout_s) and ticket.acquire(blocking=False):
                raise late
            event.wait()
        finally:
            self._swapping.release()
        result = done[0]
        if isinstance(result, Exception):
            raise result
        return result

    def status(self) -> EngineStatus:
        """A snapshot; reads counters without stopping the decode thread."""
        engine, totals, sizes = self.engine, self._totals, self._sizes
        return EngineStatus(
            phase=self._phase,
            detail=self._detail,
            running=len(engine.running),
            waiting=len(engine.waiting) + len(self._inbox),
            slots=engine.settings.slots,
            drafter_version=engine.drafter_version,
            cycles=totals["cycles"],
            draft_tokens=totals["draft_tokens"],
            accepted_tokens=totals["accepted_tokens"],
            accepted_per_position=tuple(self._per_position),
            prompt_tokens=totals["prompt_tokens"],
            generation_tokens=totals["generation_tokens"],
            finished=dict(self._finished),
            draft_s=totals["draft_us"] / 1e6,
            verify_s=totals["verify_us"] / 1e6,
            other_s=totals["other_us"] / 1e6,
            kv_tokens_used=sum(len(s.tokens) for s in list(engine.running)),
            kv_tokens_capacity=engine.settings.slots * engine.settings.capacity_tokens,
            windows=len(self.windows),
            window_bytes=self.windows.num_bytes,
            windows_dropped=self.windows.dropped,
            swaps=self._swaps,
            speculation=engine.speculation,
            tree_nodes_mean=sizes.mean_nodes if sizes else 0.0,
            tree_leaves_mean=sizes.mean_leaves if sizes else 0.0,
            tree_blocks_mean=sizes.mean_blocks if sizes else 0.0,
            plain_cycles_share=sizes.plain_share if sizes else 0.0,
            probe_seconds_share=sizes.probe_share if sizes else 0.0,
            probe_lost_seconds_share=sizes.probe_lost_share if sizes else 0.0,
        )

    def close(self) -> None:
        """Stops the decode thread after its current cycle."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout=30)

    def _post(self, action: Callable[[], None]) -> None:
        with self._changed:
            self._inbox.append(action)
            self._changed.notify_all()

    def _accept(self, request: GenerationRequest) -> None:
        # Requests that came during a long cycle find slots free that are filled only when the next one begins.
        free = self.engine.settings.slots - len(self.engine.running)
        if self._phase == "failed":
            self._refuse(request, self._detail)
        elif len(self.engine.waiting) >= self._max_waiting + free:
            self._refuse(request, "the queue is full")
        else:
            try:
                self.engine.submit(request)
            except Exception as error:  # of whatever kind: it is this request that cannot run
                log.warning("request %s cannot run", request.request_id, exc_info=error)
                self._refuse(request, str(error) if isinstance(error, ValueError) else _named(error))

    def _refuse(self, request: GenerationRequest, message: str) -> None:
        self._emit(
            [TokenChunk(request_id=request.request_id, tokens=(), text="", finish_reason="error", error=message)]
        )

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._inbox or self._stopping or not self.engine.idle, 1.0)
                if self._stopping:
                    return
                actions = list(self._inbox)
                self._inbox.clear()
            for action in actions:
                try:
                    action()
                except Exception:  # one caller's trouble must not end the thread that serves all of them
                    log.exception("a call to the engine failed")
            try:
                chunks = self.engine.step()
            except Exception as error:  # whatever broke, callers must hear of it instead of waiting forever
                log.exception("the decode loop failed")
                self._fail(error)
                continue
            if chunks:
                self._failures = 0
                self._emit(chunks)

    def _fail(self, error: Exception) -> None:
        """Ends the requests of a cycle that raised; what waits gets its turn unless failures follow each other."""
        self._failures += 1
        lost: list[RequestState] = list(self.engine.running)
        if self._failures >= _MOST_FAILURES:
            self._phase, self._detail = "failed", _named(error)
            lost += self.engine.waiting
        for state in lost:
            try:
                self.engine.cancel(state.request.request_id)  # gives the slot back
            except Exception:
                log.exception("request %s could not be dropped", state.request.request_id)
        self._emit(
            [
                TokenChunk(
                    request_id=s.request.request_id, tokens=(), text="", finish_reason="error", error=_named(error)
                )
                for s in lost
            ]
        )

    def _emit(self, chunks: list[TokenChunk]) -> None:
        for chunk in chunks:
            self._totals["generation_tokens"] += len(chunk.tokens)
            if chunk.finish_reason is not None:
                self._finished[chunk.finish_reason] += 1
                if chunk.stats is not None:
                    self._count(chunk.stats)
                if self.engine.planner is not None:
                    self._sizes = self.engine.planner.status()
        with self._changed:
            self._output.extend(chunks)
            self._changed.notify_all()

    def _count(self, stats: RequestStats) -> None:
        totals = self._totals
        totals["prompt_tokens"] += stats.prompt_tokens
        totals["cycles"] += stats.cycles
        totals["draft_tokens"] += stats.draft_tokens
        totals["accepted_tokens"] += stats.accepted_tokens
        for name, seconds in (("draft", stats.draft_s), ("verify", stats.verify_s), ("other", stats.other_s)):
            totals[f"{name}_us"] += round(seconds * 1e6)
        histogram = stats.acceptance_histogram
        while len(self._per_position) < len(histogram) - 1:
            self._per_position.append(0)
        for position in range(len(histogram) - 1):
            self._per_position[position] += sum(histogram[position + 1 :])

    def _near(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights on the drafter's device, brought there while decoding goes on: only copies there stall it."""
        drafter = self.engine.drafter
        if drafter is None or drafter.device.type != "cuda":
            return weights
        stream = torch.cuda.Stream(drafter.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            near = {name: tensor.to(drafter.device) for name, tensor in weights.items()}
        stream.synchronize()
        for tensor in near.values():
            tensor.record_stream(torch.cuda.default_stream(drafter.device))  # the decode thread's, which reads them
        return near

    def _load(self, version: str, weights: dict[str, Tensor]) -> bool:
        model = self.engine.drafter.model if self.engine.drafter is not None else None
        if not isinstance(model, DraftNetwork):
            raise ValueError("this engine has no drafter weights to swap")
        # Weights come from the trainer's device, and comparing needs both on one.
        valid = all(
            name.startswith(_ABOVE_BACKBONE) or torch.equal(own, weights.get(name, own).to(own.device))
            for name, own in model.state_dict().items()
        )
        load_weights(model, weights, version)
        self.engine.drafter_version = version
        self._swaps += 1
        return valid


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

"""The gateway's way to the engine actor: one call per request, one stream of chunks for all of them.

An engine that dies is restarted by Ray. Its requests are then sent again: their text is a function of prompt,
parameters and seed, so the second run repeats what the caller already has, which is checked and left out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ray.exceptions import ActorDiedError, RayActorError

from specblock.daemon.errors import DependencyError
from specblock.daemon.messages import EngineStatus, GenerationRequest, TokenChunk

log = logging.getLogger(__name__)

_POLL_S = 1.0
_ATTEMPTS = 2  # of one request; one that kills the engine must not do so until Ray gives up on it
_RESTART_DEADLINE_S = 300.0


class _EngineLostError(Exception):
    """The engine died under a request."""


@dataclass(slots=True)
class Transcript:
    """What the caller of one request has received, over all attempts."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    _token_place: int = 0
    _text_place: int = 0

    def restart(self) -> None:
        """The next chunk is the first of a new attempt."""
        self._token_place = self._text_place = 0

    def fresh(self, chunk: TokenChunk) -> TokenChunk:
        """The part of ``chunk`` that the caller does not have yet.

        Raises:
            DependencyError: the attempt came to another text, so it cannot continue what the caller has.
        """
        tokens, text = list(chunk.tokens), chunk.text
        known_tokens = self.tokens[self._token_place : self._token_place + len(tokens)]
        known_text = self.text[self._text_place : self._text_place + len(text)]
        if tokens[: len(known_tokens)] != known_tokens or not text.startswith(known_text):
            raise DependencyError("the restarted engine came to another text than the caller already has")
        self._token_place += len(tokens)
        self._text_place += len(text)
        tokens, text = tokens[len(known_tokens) :], text[len(known_text) :]
        self.tokens += tokens
        self.text += text
        return replace(chunk, tokens=tuple(tokens), text=text)


class RayEngineClient:
    """Implements the gateway's EngineClient over an engine actor handle."""

    def __init__(self, poll_s: float = _POLL_S, restart_deadline_s: float = _RESTART_DEADLINE_S) -> None:
        self._engine: Any = None
        self._poll_s, self._restart_deadline_s = poll_s, restart_deadline_s
        self._queues: dict[str, asyncio.Queue[TokenChunk | None]] = {}
        """By the attempt's id; None says that the engine died."""
        self._waiting = 0
        self._attempts: dict[str, str] = {}
        """The current attempt's id of requests that were sent again."""
        self._submitting: dict[str, asyncio.Future[Any]] = {}
        self._status = EngineStatus(phase="loading", detail="starting")
        self._tasks: set[asyncio.Task[None]] = set()
        self._phase_override = ""
        self._up = asyncio.Event()
        self._life = 0
        self._gone: asyncio.Future[str] | None = None

    @property
    def queue_depth(self) -> int:
        """Requests submitted and not finished."""
        return self._waiting

    def attach(self, engine: Any) -> None:
        """Starts following an engine that has loaded."""
        self._engine = engine
        self._gone = asyncio.get_running_loop().create_future()
        self._up.set()
        self._spawn(self._pump())
        self._spawn(self._watch())

    def report(self, phase: str, detail: str) -> None:
        """Shows a phase while the engine cannot speak for itself (loading, draining, failed)."""
        self._phase_override = phase
        self._status = replace(self._status, phase=phase, detail=detail)

    async def gone(self) -> str:
        """Waits until the engine is dead for good; returns the reason."""
        assert self._gone is not None, "attach an engine first"
        return await asyncio.shield(self._gone)

    async def submit(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Starts a request and yields its chunks until the last one; sends it again if the engine dies.

        Raises:
            DependencyError: the engine refused or failed, did not come back, or died twice.
        """
        transcript = Transcript()
        self._waiting += 1
        try:
            for attempt in range(_ATTEMPTS):
                name = f"{request.request_id}~{attempt}" if attempt else request.request_id
                if attempt:
                    self._attempts[request.request_id] = name
                transcript.restart()
                try:
                    async for chunk in self._attempt(replace(request, request_id=name)):
                        part = transcript.fresh(chunk)
                        if part.tokens or part.text or part.finish_reason is not None:
                            yield replace(part, request_id=request.request_id)
                        if part.finish_reason is not None:
                            self._attempts.pop(request.request_id, None)
                            return
                except _EngineLostError:
                    continue
            raise DependencyError(f"the engine died {_ATTEMPTS} times under this request")
        finally:
            self._waiting -= 1

    async def cancel(self, request_id: str) -> None:
        """Drops a request; unknown ids are fine."""
        name = self._attempts.pop(request_id, request_id)
        if self._engine is None or not self._up.is_set():
            return
        # The actor runs calls side by side: a cancel sent now could overtake the submit and find nothing to cancel.
        submitting = self._submitting.get(name)
        if submitting is not None:
            await asyncio.wait([submitting])
        with suppress(RayActorError):  # dead, and the request with it
            await self._engine.cancel.remote(name)

    async def status(self) -> EngineStatus:
        """The latest snapshot, at most a second old."""
        return self._status

    def abandon(self, reason: str) -> None:
        """Ends every request with an error; later ones end at once."""
        if self._gone is None or self._gone.done():
            return
        self._gone.set_result(reason)
        self._up.set()
        for queue in self._queues.values():
            queue.put_nowait(None)

    async def close(self) -> None:
        """Stops following the engine."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _attempt(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        await self._wait_until_up()
        life = self._life
        queue: asyncio.Queue[TokenChunk | None] = asyncio.Queue()
        self._queues[request.request_id] = queue
        submitting = asyncio.ensure_future(self._engine.submit.remote(request))
        self._submitting[request.request_id] = submitting
        submitting.add_done_callback(lambda _: self._submitting.pop(request.request_id, None))
        try:
            await asyncio.shield(submitting)
            while True:
                chunk = await queue.get()
                if chunk is None:
                    raise _EngineLostError
                if chunk.finish_reason == "error":
                    raise DependencyError(chunk.error or "the engine failed")
                yield chunk
        except RayActorError as error:
            self._lost(life, error)
            raise _EngineLostError from None
        finally:
            self._queues.pop(request.request_id, None)

    async def _wait_until_up(self) -> None:
        try:
            await asyncio.wait_for(self._up.wait(), self._restart_deadline_s)
        except TimeoutError:
            raise DependencyError(f"the engine is not back after {self._restart_deadline_s:g} s") from None
        if self._gone is not None and self._gone.done():
            raise DependencyError(self._gone.result())

    async def _pump(self) -> None:
        while True:
            await self._wait_for_life()
            life = self._life
            try:
                chunks = await self._engine.next_chunks.remote(self._poll_s)
            except RayActorError as error:
                self._lost(life, error)
                continue
            for chunk in chunks:
                queue = self._queues.get(chunk.request_id)
                if queue is not None:
                    queue.put_nowait(chunk)

    async def _watch(self) -> None:
        while True:
            await self._wait_for_life()
            life = self._life
            try:
                status = await self._engine.status.remote()
            except RayActorError as error:
                self._lost(life, error)
                continue
            if self._phase_override:
                status = replace(status, phase=self._phase_override)
            if self._up.is_set():
                self._status = status
            await asyncio.sleep(self._poll_s / 4)

    async def _wait_for_life(self) -> None:
        """Like ``_wait_until_up`` for the followers, which stand still once the engine is gone."""
        await self._up.wait()
        if self._gone is not None and self._gone.done():
            await asyncio.Event().wait()

    def _lost(self, life: int, error: RayActorError) -> None:
        """Hears once of every death, from whichever call noticed it first."""
        if life != self._life or not self._up.is_set():
            return
        self._up.clear()
        self._status = replace(self._status, phase="loading", detail="the engine is restarting")
        log.error("the engine died, %d requests wait for its restart: %s", self._waiting, one_line(error))
        for queue in self._queues.values():
            queue.put_nowait(None)
        self._spawn(self._recover())

    async def _recover(self) -> None:
        begin = time.monotonic()
        while True:
            try:
                await self._engine.pid.remote()
            except ActorDiedError as error:  # not "unavailable": Ray has given up on it
                self.report("failed", "the engine is gone")
                self.abandon(f"the engine is gone: {one_line(error)}")
                break
            except RayActorError:
                await asyncio.sleep(self._poll_s / 4)
                continue
            log.info("the engine is back after %.1f s", time.monotonic() - begin)
            break
        self._life += 1
        self._up.set()

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("following the engine failed: %s", one_line(error), exc_info=error)
            self.report("failed", "the engine cannot be followed; the log says why")


def one_line(error: BaseException) -> str:
    """The last line of what Ray says, which names the cause; the lines before it are its traceback."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]

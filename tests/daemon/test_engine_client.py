"""The gateway's client against an actor handle that dies on command: retries, cancelling, giving up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from specblock.cuda_ext.sampling import SamplingParams
from specblock.daemon.bandit_actor import ErrorWatch
from specblock.daemon.engine_client import RayEngineClient, Transcript
from specblock.daemon.errors import DependencyError
from specblock.daemon.messages import EngineStatus, GenerationRequest, TokenChunk

DEADLINE_S = 20.0
TEXT = "the quick brown fox jumps over the lazy dog"


class Method:
    """An actor method: ``handle.method.remote(...)`` starts it and returns something to await."""

    def __init__(self, function: Callable[..., Awaitable[Any]]) -> None:
        self._function = function

    def remote(self, *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self._function(*arguments))


@dataclass
class Handle:
    """An engine actor that writes TEXT, ``sizes`` tokens per chunk in turn, one token per letter."""

    sizes: tuple[int, ...] = (3,)
    alive: bool = True
    for_good: bool = False
    texts: list[str] = field(default_factory=lambda: [TEXT, TEXT, TEXT])
    submitted: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    slow_submit: asyncio.Event | None = None
    output: asyncio.Queue[TokenChunk] = field(default_factory=asyncio.Queue)
    jobs: dict[str, tuple[str, int]] = field(default_factory=dict)
    died: asyncio.Event = field(default_factory=asyncio.Event)

    def __getattr__(self, name: str) -> Method:
        return Method(object.__getattribute__(self, f"_{name}"))

    def _check(self) -> None:
        if not self.alive:
            raise ActorDiedError() if self.for_good else ActorUnavailableError("restarting", None)

    async def _pid(self) -> int:
        self._check()
        return 1

    async def _submit(self, request: GenerationRequest) -> None:
        if self.slow_submit is not None:
            await self.slow_submit.wait()
        self._check()
        self.submitted.append(request.request_id)
        self.jobs[request.request_id] = (self.texts.pop(0), 0)

    async def _cancel(self, request_id: str) -> None:
        self._check()
        self.cancelled.append(request_id)
        self.jobs.pop(request_id, None)

    async def _status(self) -> EngineStatus:
        self._check()
        return EngineStatus(phase="ready")

    async def _next_chunks(self, timeout_s: float) -> list[TokenChunk]:
        self._check()
        get = asyncio.ensure_future(self.output.get())
        dead = asyncio.ensure_future(self.died.wait())
        await asyncio.wait({get, dead}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        chunk = get.result() if get.done() and not get.cancelled() else None
        get.cancel()
        dead.cancel()
        self._check()
        return [] if chunk is None else [chunk]

    def write(self, request_id: str, letters: int) -> None:
        """Produces so many more letters."""
        text, place = self.jobs[request_id]
        piece = text[place : place + letters]
        self.jobs[request_id] = (text, place + letters)
        done = place + letters >= len(text)
        self.output.put_nowait(
            TokenChunk(
                request_id=request_id, tokens=tuple(map(ord, piece)), text=piece, finish_reason="stop" if done else None
            )
        )

    def die(self, for_good: bool = False) -> None:
        self.alive, self.for_good = False, for_good
        self.jobs.clear()
        self.died.set()

    def restart(self) -> None:
        self.alive = True
        self.output = asyncio.Queue()
        self.died = asyncio.Event()


def request(name: str = "r") -> GenerationRequest:
    return GenerationRequest(request_id=name, prompt_tokens=(1,), sampling=SamplingParams(seed=1), max_tokens=99)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def with_client(check: Callable[[RayEngineClient, Handle], Awaitable[None]]) -> None:
    async def run() -> None:
        client, handle = RayEngineClient(poll_s=0.02), Handle()
        client.attach(handle)
        try:
            await check(client, handle)
        finally:
            await client.close()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


async def read(client: RayEngineClient, got: list[TokenChunk], name: str = "r") -> None:
    async for chunk in client.submit(request(name)):
        got.append(chunk)


def test_a_killed_engines_request_goes_on_where_it_stopped() -> None:
    async def check(client: RayEngineClient, handle: Handle) -> None:
        got: list[TokenChunk] = []
        reading = asyncio.create_task(read(client, got))
        await until(lambda: "r" in handle.jobs)
        handle.write("r", 10)
        await until(lambda: got)
        handle.die()
        await until(lambda: not client._up.is_set())
        assert (await client.status()).phase == "loading" and client.queue_depth == 1
        handle.restart()
        await until(lambda: "r~1" in handle.jobs)
        for _ in range(len(TEXT) // 3 + 1):  # other chunk borders than before
            handle.write("r~1", 3)
        await reading
        assert "".join(c.text for c in got) == TEXT
        assert [t for c in got for t in c.tokens] == list(map(ord, TEXT))
        assert {c.request_id for c in got} == {"r"} and got[-1].finish_reason == "stop"
        assert client.queue_depth == 0
        await until(lambda: client._status.phase == "ready")

    with_client(check)


def test_a_request_whose_repetition_differs_ends_with_an_error() -> None:
    async def check(client: RayEngineClient, handle: Handle) -> None:
        handle.texts = [TEXT, "the slow" + TEXT]
        got: list[TokenChunk] = []
        reading = asyncio.create_task(read(client, got))
        await until(lambda: "r" in handle.jobs)
        handle.write("r", 10)
        await until(lambda: got)
        handle.die()
        await until(lambda: not client._up.is_set())
        handle.restart()
        await until(lambda: "r~1" in handle.jobs)
        handle.write("r~1", 8)
        with pytest.raises(DependencyError, match="another text"):
            await reading
        await client.cancel("r")
        assert handle.cancelled == ["r~1"]

    with_client(check)


def test_a_request_that_kills_the_engine_twice_is_not_sent_a_third_time() -> None:
    async def check(client: RayEngineClient, handle: Handle) -> None:
        got: list[TokenChunk] = []
        reading = asyncio.create_task(read(client, got))
        for name in ("r", "r~1"):
            await until(lambda name=name: name in handle.jobs)
            handle.die()
            await until(lambda: not client._up.is_set())
            handle.restart()
        with pytest.raises(DependencyError, match="died 2 times"):
            await reading
        await until(client._up.is_set)
        assert handle.submitted == ["r", "r~1"]

    with_client(check)


def test_an_engine_that_ray_gives_up_on(caplog: pytest.LogCaptureFixture) -> None:
    async def check(client: RayEngineClient, handle: Handle) -> None:
        reading = asyncio.create_task(read(client, []))
        await until(lambda: "r" in handle.jobs)
        handle.die(for_good=True)
        assert await client.gone()
        with pytest.raises(DependencyError, match="the engine is gone"):
            await reading
        with pytest.raises(DependencyError, match="the engine is gone"):
            await read(client, [])
        assert (await client.status()).phase == "failed" and client.queue_depth == 0
        await client.cancel("r")
        await asyncio.sleep(0.1)

    with_client(check)
    assert len([r for r in caplog.records if r.levelname == "ERROR"]) == 1, "one line per death"


def test_an_engine_that_does_not_come_back_in_time() -> None:
    async def run() -> None:
        client, handle = RayEngineClient(poll_s=0.02, restart_deadline_s=0.1), Handle()
        client.attach(handle)
        handle.die()
        await until(lambda: not client._up.is_set())
        with pytest.raises(DependencyError, match="not back after"):
            await read(client, [])
        await client.close()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_a_cancel_never_overtakes_its_submit() -> None:
    async def check(client: RayEngineClient, handle: Handle) -> None:
        handle.slow_submit = asyncio.Event()
        reading = asyncio.create_task(read(client, []))
        await until(lambda: client._submitting)
        reading.cancel()
        cancelling = asyncio.create_task(client.cancel("r"))
        await asyncio.sleep(0.02)
        assert handle.cancelled == []
        handle.slow_submit.set()
        await cancelling
        assert handle.submitted == handle.cancelled == ["r"] and handle.jobs == {}
        await client.cancel("unknown")

    with_client(check)


def test_a_transcript_leaves_out_what_is_known_whatever_the_borders() -> None:
    transcript = Transcript()
    first = TokenChunk(request_id="r", tokens=(1, 2, 3), text="ab")
    assert transcript.fresh(first) == first
    transcript.restart()
    assert transcript.fresh(TokenChunk(request_id="r", tokens=(1, 2), text="")).tokens == ()
    rest = transcript.fresh(TokenChunk(request_id="r", tokens=(3, 4), text="abcd"))
    assert (rest.tokens, rest.text) == ((4,), "cd")
    with pytest.raises(DependencyError):
        transcript.restart()
        transcript.fresh(TokenChunk(request_id="r", tokens=(1,), text="x"))


def test_a_daemon_that_stops_ends_its_requests_with_an_error() -> None:
    async def check(client: RayEngineClient, handle: Handle) -> None:
        reading = asyncio.create_task(read(client, []))
        await until(lambda: "r" in handle.jobs)
        client.abandon("the daemon is stopping")
        with pytest.raises(DependencyError, match="the daemon is stopping"):
            await reading
        assert handle.submitted == ["r"] and client.queue_depth == 0
        client.abandon("twice is harmless")

    with_client(check)


def test_the_bandits_errors_reach_the_log_once_a_minute() -> None:
    now = [0.0]
    watch = ErrorWatch(lambda: now[0])
    assert watch.new_errors({}) == watch.new_errors({"snapshot_errors": 0}) == []
    (line,) = watch.new_errors({"snapshot_errors": 3})
    assert "disk of state_dir full" in line and "3 times" in line
    assert watch.new_errors({"snapshot_errors": 9}) == []
    now[0] = 61.0
    assert len(watch.new_errors({"snapshot_errors": 9, "step_errors": 1})) == 2
    now[0] = 200.0
    assert watch.new_errors({"snapshot_errors": 9, "step_errors": 1}) == []

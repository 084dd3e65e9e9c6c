"""Small real stand-ins for tests: an engine that streams scripted tokens, and a tokenizer of one token per letter."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

from specblock.daemon.messages import EngineStatus, GenerationRequest, RequestStats, TokenChunk


class LetterCodec:
    """Token id = code point; the vocabulary is ASCII plus one chat marker (127)."""

    def __init__(self, chat: bool = False) -> None:
        self._chat = chat

    @property
    def vocab_size(self) -> int:
        return 128

    @property
    def has_chat_template(self) -> bool:
        return self._chat

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(chr(token) for token in tokens)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if messages[-1]["role"] != "user":
            raise ValueError("the last message must come from the user")
        return self.encode("".join(f"{message['role']}:{message['content']}\x7f" for message in messages))


def stats_of(request: GenerationRequest, completion_tokens: int) -> RequestStats:
    """Stats of a request that accepted one draft token in each of its cycles."""
    cycles = max(1, completion_tokens // 2)
    return RequestStats(
        prompt_tokens=len(request.prompt_tokens),
        completion_tokens=completion_tokens,
        cycles=cycles,
        draft_tokens=4 * cycles,
        accepted_tokens=cycles,
        acceptance_histogram=(0, cycles, 0),
        queue_s=0.01,
        prefill_s=0.02,
        decode_s=0.5,
        drafter_version="v000000-base",
    )


@dataclass
class ScriptedEngine:
    """An EngineClient that answers every prompt with ``script``, two tokens per chunk, up to ``max_tokens``.

    ``hold_after`` chunks it waits until ``released`` is set. ``fail_after`` chunks it ends as ``failure`` says.
    """

    script: str = "hello world"
    phase: str = "ready"
    hold_after: int | None = None
    fail_after: int | None = None
    failure: Exception | str | None = None
    """An exception to raise, text for an error chunk, or None to stop without a last chunk."""
    with_stats: bool = True
    status_error: Exception | None = None
    other_load: int = 0
    requests: list[GenerationRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    holding: asyncio.Event = field(default_factory=asyncio.Event)
    cancel_seen: asyncio.Event = field(default_factory=asyncio.Event)
    running: int = 0

    @property
    def queue_depth(self) -> int:
        return self.running + self.other_load

    async def submit(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        self.requests.append(request)
        self.running += 1
        try:
            text = self.script[: request.max_tokens]
            pieces = [text[start : start + 2] for start in range(0, len(text), 2)]
            for index, piece in enumerate(pieces):
                if index == self.hold_after:
                    self.holding.set()
                    await self.released.wait()
                if index == self.fail_after:
                    if isinstance(self.failure, Exception):
                        raise self.failure
                    if self.failure is not None:
                        yield TokenChunk(
                            request_id=request.request_id,
                            tokens=(),
                            text="",
                            finish_reason="error",
                            error=self.failure,
                        )
                    return
                last = index == len(pieces) - 1
                yield TokenChunk(
                    request_id=request.request_id,
                    tokens=tuple(map(ord, piece)),
                    text=piece,
                    finish_reason=("length" if len(text) == request.max_tokens else "stop") if last else None,
                    stats=stats_of(request, len(text)) if last and self.with_stats else None,
                )
                await asyncio.sleep(0)
        finally:
            self.running -= 1

    async def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self.cancel_seen.set()

    async def status(self) -> EngineStatus:
        if self.status_error is not None:
            raise self.status_error
        return EngineStatus(phase=self.phase, detail="layer 3 of 12" if self.phase == "loading" else "")

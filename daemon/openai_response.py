"""Answers in OpenAI's shape, whole or as server-sent events, with the speculative-decoding summary vLLM attaches."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from specblock.daemon.api_error import ApiError
from specblock.daemon.generation_job import GenerationJob, IndexedChunk
from specblock.daemon.messages import RequestStats

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """What all chunks of one answer share. ``created_unix_s`` is whole seconds since the epoch."""

    response_id: str
    model: str
    created_unix_s: int
    chat: bool
    include_usage: bool = False

    def envelope(self, choices: list[dict[str, Any]], streamed: bool) -> dict[str, Any]:
        """The object around the choices."""
        kind = ("chat.completion.chunk" if streamed else "chat.completion") if self.chat else "text_completion"
        return {
            "id": self.response_id,
            "object": kind,
            "created": self.created_unix_s,
            "model": self.model,
            "choices": choices,
        }

    def whole_choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        """One complete choice."""
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}

    def delta_choice(self, index: int, text: str, finish_reason: str | None, first: bool) -> dict[str, Any]:
        """A piece of a choice; the first piece of a chat answer names the role."""
        role = {"role": "assistant"} if first else {}
        content = {"delta": {**role, "content": text}} if self.chat else {"text": text}
        return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}


@dataclass(slots=True)
class AnswerState:
    """What has arrived of an answer so far."""

    prompt_tokens: int
    texts: list[str]
    finish_reasons: list[str | None]
    stats: list[RequestStats | None]
    streamed_tokens: int = 0
    started: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, job: GenerationJob) -> AnswerState:
        """Nothing has arrived; the texts start with the echoed prompts."""
        count = len(job.batch.requests)
        return cls(job.batch.prompt_tokens, list(job.batch.echo or [""] * count), [None] * count, [None] * count)

    def take(self, item: IndexedChunk) -> None:
        """Adds a chunk."""
        self.texts[item.index] += item.chunk.text
        self.streamed_tokens += len(item.chunk.tokens)
        if item.chunk.finish_reason is not None:
            self.finish_reasons[item.index] = item.chunk.finish_reason
            self.stats[item.index] = item.chunk.stats

    @property
    def usage(self) -> dict[str, Any]:
        """Token counts; the details count draft tokens, which are never part of the completion's count."""
        known = [stats for stats in self.stats if stats is not None]
        complete = len(known) == len(self.stats)
        completion = sum(stats.completion_tokens for stats in known) if complete else self.streamed_tokens
        accepted = sum(stats.accepted_tokens for stats in known)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": sum(stats.draft_tokens for stats in known) - accepted,
            },
        }

    @property
    def extras(self) -> dict[str, Any]:
        """Our additions to the response root; null for answers of several generations, as in vLLM."""
        only = self.stats[0] if len(self.stats) == 1 else None
        versions = sorted({stats.drafter_version for stats in self.stats if stats is not None})
        return {
            "drafter_version": ",".join(versions) or None,
            "metrics": None if only is None else request_metrics(only),
        }


def request_metrics(stats: RequestStats) -> dict[str, Any]:
    """vLLM's per-request summary. ``num_draft_tokens`` counts tree nodes, accepted tokens count the path."""
    decode_s = stats.decode_s
    return {
        "queue_time_ms": round(1000 * stats.queue_s, 3),
        "prefill_time_ms": round(1000 * stats.prefill_s, 3),
        "generation_time_ms": round(1000 * decode_s, 3),
        "tokens_per_second": round(stats.completion_tokens / decode_s, 3) if decode_s else None,
        "speculative_decoding": {
            "mean_acceptance_length": 1 + stats.accepted_tokens / stats.cycles if stats.cycles else None,
            "draft_acceptance_rate": stats.accepted_tokens / stats.draft_tokens if stats.draft_tokens else None,
            "acceptance_histogram": list(stats.acceptance_histogram),
            "num_spec_steps": stats.cycles,
            "num_accepted_draft_tokens": stats.accepted_tokens,
            "num_draft_tokens": stats.draft_tokens,
            "num_spec_tokens": max(len(stats.acceptance_histogram) - 1, 0),
        },
    }


async def whole_answer(job: GenerationJob, form: AnswerFormat) -> dict[str, Any]:
    """Waits for every generation.

    Raises:
        ApiError: one of them failed.
    """
    state = AnswerState.of(job)
    async for item in job.chunks():
        state.take(item)
    choices = [
        form.whole_choice(index, text, reason or "error")
        for index, (text, reason) in enumerate(zip(state.texts, state.finish_reasons, strict=True))
    ]
    return {**form.envelope(choices, streamed=False), "usage": state.usage, **state.extras}


async def event_stream(job: GenerationJob, form: AnswerFormat) -> AsyncIterator[str]:
    """Server-sent events; a failure becomes an error event, and ``[DONE]`` always comes last."""
    state = AnswerState.of(job)
    unused = {"usage": None} if form.include_usage else {}
    try:
        async for item in job.chunks():
            state.take(item)
            if not item.chunk.text and item.chunk.finish_reason is None:
                continue  # all of its text is held back
            choice = _delta(job, form, state, item)
            extras = state.extras if job.complete and not form.include_usage else {}
            yield _event({**form.envelope([choice], streamed=True), **unused, **extras})
        if form.include_usage:
            yield _event({**form.envelope([], streamed=True), "usage": state.usage, **state.extras})
    except ApiError as error:
        yield _event(error.body)
    yield DONE


def _delta(job: GenerationJob, form: AnswerFormat, state: AnswerState, item: IndexedChunk) -> dict[str, Any]:
    first = item.index not in state.started
    state.started.add(item.index)
    echo = job.batch.echo[item.index] if first and job.batch.echo else ""
    return form.delta_choice(item.index, echo + item.chunk.text, item.chunk.finish_reason, first)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"

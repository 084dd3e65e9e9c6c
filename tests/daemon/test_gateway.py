"""The OpenAI-compatible endpoint against a scripted engine: answers, every refusal, streaming, limits, cancelling."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from specblock.daemon.config import DaemonConfig
from specblock.daemon.errors import DependencyError
from specblock.daemon.gateway import create_app
from specblock.daemon.gateway_state import served_name
from tests.fakes import LetterCodec, ScriptedEngine

DEADLINE_S = 20.0


def config(**sections: dict[str, Any]) -> DaemonConfig:
    tree: dict[str, Any] = {
        "target": {"model": "org/m", "dtype": "float32", "max_context_tokens": 64},
        "drafter": {"path": "d"},
        "engine": {"slots": 2, "max_waiting": 2, "max_output_tokens": 32},
        "windows": {"max_window_tokens": 64},
    }
    return DaemonConfig.model_validate(
        {name: {**tree.get(name, {}), **sections.get(name, {})} for name in {*tree, *sections}}
    )


def make_app(engine: ScriptedEngine, chat: bool = False, **sections: dict[str, Any]) -> Any:
    return create_app(
        engine,
        config(**sections),
        LetterCodec(chat),
        rng=random.Random(5),
        clock=asyncio.get_running_loop().time,
        wall_clock=lambda: 1234.5,
        version="9.9",
        bandit_status=lambda: {"decisions_by_arm_total": {"skip": 3}},
    )


def with_client(
    check: Callable[[httpx.AsyncClient], Awaitable[None]], engine: ScriptedEngine, chat: bool = False, **sections: Any
) -> None:
    """Runs ``check`` against the app over httpx's in-process transport."""

    async def run() -> None:
        transport = httpx.ASGITransport(app=make_app(engine, chat, **sections), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await check(client)

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def events(text: str) -> list[Any]:
    assert text.endswith("data: [DONE]\n\n")
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [json.loads(line) for line in lines[:-1]]


def test_a_plain_completion() -> None:
    engine = ScriptedEngine()

    async def check(client: httpx.AsyncClient) -> None:
        reply = await client.post("/v1/completions", json={"model": "org/m", "prompt": "hi", "max_tokens": 20})
        assert reply.status_code == 200
        body = reply.json()
        assert body["choices"] == [{"index": 0, "text": "hello world", "logprobs": None, "finish_reason": "stop"}]
        assert (body["object"], body["model"], body["created"]) == ("text_completion", "org/m", 1234)
        assert body["usage"] == {
            "prompt_tokens": 2,
            "completion_tokens": 11,
            "total_tokens": 13,
            "completion_tokens_details": {"accepted_prediction_tokens": 5, "rejected_prediction_tokens": 15},
        }
        assert body["drafter_version"] == "v000000-base"
        assert body["metrics"]["speculative_decoding"] == {
            "mean_acceptance_length": 2.0,
            "draft_acceptance_rate": 0.25,
            "acceptance_histogram": [0, 5, 0],
            "num_spec_steps": 5,
            "num_accepted_draft_tokens": 5,
            "num_draft_tokens": 20,
            "num_spec_tokens": 2,
        }
        assert body["metrics"]["tokens_per_second"] == 22.0
        assert len(reply.headers["x-request-id"]) == 32

    with_client(check, engine)
    (request,) = engine.requests
    assert request.prompt_tokens == (104, 105)
    assert (request.max_tokens, request.domain, request.collect) == (20, "default", True)
    assert (request.sampling.temperature, request.sampling.top_p) == (1.0, 1.0)
    assert engine.cancelled == []


def test_parameters_reach_the_engine() -> None:
    engine = ScriptedEngine()
    body = {
        "prompt": [104, 105],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "logit_bias": {"7": -100, "3": 2.5},
        "seed": -7,
        "stop": "x",
        "stop_token_ids": [9],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "user": "somebody",
        "metadata": {"domain": "python"},
    }

    async def check(client: httpx.AsyncClient) -> None:
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        headers = {"x-specblock-domain": "cpp", "x-specblock-collect": "false"}
        await client.post("/v1/completions", json={**body, "stop": ["a", "b"], "temperature": 1e-9}, headers=headers)

    with_client(check, engine)
    first, second = engine.requests
    sampling = first.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 0, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.5)
    assert (sampling.logit_bias, sampling.seed) == (((3, 2.5), (7, -100.0)), -7)
    assert (first.stop, first.stop_token_ids, first.include_stop_str_in_output) == (("x",), (9,), True)
    assert (first.ignore_eos, first.domain, first.max_tokens, first.collect) == (True, "python", 16, True)
    assert (second.domain, second.collect, second.stop) == ("cpp", False, ("a", "b"))
    assert second.sampling.temperature == 0


def test_seeds_are_drawn_fresh_and_shared_by_choices() -> None:
    engine = ScriptedEngine()

    async def check(client: httpx.AsyncClient) -> None:
        for _ in range(2):
            await client.post("/v1/completions", json={"prompt": "a", "n": 2})

    with_client(check, engine)
    seeds = [request.sampling.seed for request in engine.requests]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    assert [request.sampling.choice for request in engine.requests] == [0, 1, 0, 1]
    assert len({request.request_id for request in engine.requests}) == 4


@pytest.mark.parametrize("prompt", [["a", "bc"], [[97], [98, 99]]])
def test_several_prompts_and_choices(prompt: list[Any]) -> None:
    engine = ScriptedEngine()

    async def check(client: httpx.AsyncClient) -> None:
        reply = await client.post("/v1/completions", json={"prompt": prompt, "n": 2, "echo": True, "max_tokens": 3})
        body = reply.json()
        assert [choice["text"] for choice in body["choices"]] == ["ahel", "ahel", "bchel", "bchel"]
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
        assert {choice["finish_reason"] for choice in body["choices"]} == {"length"}
        assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (3, 12)
        assert body["metrics"] is None, "one request's timings do not describe four"

    with_client(check, engine)


def test_streaming_with_usage() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        body = {"prompt": "hi", "stream": True, "stream_options": {"include_usage": True}, "echo": True}
        reply = await client.post("/v1/completions", json=body)
        assert reply.headers["content-type"].startswith("text/event-stream")
        *chunks, last = events(reply.text)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hihello world"
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["stop"]
        assert all(chunk["usage"] is None and "metrics" not in chunk for chunk in chunks)
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 11
        assert last["drafter_version"] == "v000000-base"
        assert last["metrics"]["speculative_decoding"]["num_spec_steps"] == 5

    with_client(check, ScriptedEngine())


def test_streaming_without_usage_puts_the_summary_on_the_last_chunk() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        reply = await client.post("/v1/completions", json={"prompt": ["a", "b"], "stream": True})
        chunks = events(reply.text)
        for index in (0, 1):
            pieces = [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"][0]["index"] == index]
            assert "".join(pieces) == "hello world"
        assert "usage" not in chunks[0] and "drafter_version" not in chunks[0]
        assert chunks[-1]["drafter_version"] == "v000000-base"

    with_client(check, ScriptedEngine())


def test_chat() -> None:
    engine = ScriptedEngine()
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
    ]

    async def check(client: httpx.AsyncClient) -> None:
        reply = await client.post("/v1/chat/completions", json={"messages": messages, "max_completion_tokens": 5})
        body = reply.json()
        assert body["object"] == "chat.completion"
        assert body["choices"][0]["message"] == {"role": "assistant", "content": "hello"}
        assert body["choices"][0]["finish_reason"] == "length"
        reply = await client.post("/v1/chat/completions", json={"messages": messages, "stream": True})
        chunks = events(reply.text)
        assert chunks[0]["object"] == "chat.completion.chunk"
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "he"}
        assert chunks[1]["choices"][0]["delta"] == {"content": "ll"}
        bad = await client.post("/v1/chat/completions", json={"messages": [{"role": "assistant", "content": "x"}]})
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "messages")
        for content in ([{"type": "image_url", "image_url": {}}], 5):
            bad = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})
            assert (bad.status_code, bad.json()["error"]["param"]) == (400, "messages")

    with_client(check, engine, chat=True)
    assert "".join(map(chr, engine.requests[0].prompt_tokens)) == "system:s\x7fuser:hi\x7f"
    assert engine.requests[1].max_tokens == 32, "chat answers run to the server's limit"


def test_chat_without_a_template() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        reply = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
        assert reply.status_code == 400
        assert "no chat template" in reply.json()["error"]["message"]

    with_client(check, ScriptedEngine())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": "a\ud800b"}, "prompt"),
        ({"prompt": ["a", "\udfff"]}, "prompt"),
        ({"prompt": [128]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "x" * 64}, "prompt"),
        ({"prompt": ["x"] * 5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 33}, "max_tokens"),
        ({"prompt": "x" * 40, "max_tokens": 30}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"\u00b2": 1}}, "logit_bias"),
        ({"logit_bias": {"128": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 5}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 33}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": [200]}, "stop_token_ids"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logprobs": 0}, "logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"min_tokens": 1}, "min_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{}]}, "tools"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"metadata": {"domain": "white space"}}, "metadata.domain"),
        ({"metadata": {"domain": 5}}, "metadata.domain"),
        ({"metadata": "x"}, "metadata"),
    ],
)
def test_bad_requests_name_their_field(fields: dict[str, Any], param: str) -> None:
    engine = ScriptedEngine()

    async def check(client: httpx.AsyncClient) -> None:
        for extra in ({}, {"stream": True}) if param != "stream_options" else ({},):
            # ASCII: httpx itself refuses to send half of a surrogate pair.
            text = json.dumps({"prompt": "hi", **extra, **fields})
            reply = await client.post("/v1/completions", content=text, headers={"content-type": "application/json"})
            assert reply.status_code == 400, reply.text
            error = reply.json()["error"]
            assert error["param"] == param, error
            assert (error["type"], error["code"]) == ("BadRequestError", 400)
            assert error["message"]

    with_client(check, engine)
    assert engine.requests == []


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none(value: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"):
            reply = await client.post(
                "/v1/completions",
                content=f'{{"prompt": "a", "{name}": {value}}}',
                headers={"content-type": "application/json"},
            )
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, name)

    with_client(check, ScriptedEngine())


@pytest.mark.parametrize("content", ["{", "", "[]", '"x"', "nul", '{"prompt": "\\ud800"}'])
def test_bodies_that_are_no_request(content: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        reply = await client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert reply.status_code == 400
        assert reply.json()["error"]["type"] == "BadRequestError"

    with_client(check, ScriptedEngine())


def test_bad_headers() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        for name, value in (("x-specblock-domain", "a b"), ("x-specblock-collect", "maybe")):
            reply = await client.post("/v1/completions", json={"prompt": "a"}, headers={name: value})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, name)

    with_client(check, ScriptedEngine())


def test_neutral_values_of_unsupported_fields_pass() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        neutral = {"logprobs": None, "suffix": None, "best_of": 1, "min_tokens": 0, "tools": [], "stream": None}
        assert (await client.post("/v1/completions", json={"prompt": "a", **neutral})).status_code == 200

    with_client(check, ScriptedEngine())


def test_unknown_fields_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        for _ in range(3):
            reply = await client.post("/v1/completions", json={"prompt": "a", "frobnicate": 1, "user": "u"})
            assert reply.status_code == 200

    with_client(check, ScriptedEngine())
    assert len([record for record in caplog.records if "frobnicate" in record.getMessage()]) == 1
    assert "'user'" not in caplog.text


def test_models_and_version() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        (card,) = (await client.get("/v1/models")).json()["data"]
        assert (card["id"], card["object"], card["max_model_len"]) == ("org/m", "model", 64)
        assert (await client.get("/v1/models/org/m")).json() == card
        for reply in (
            await client.get("/v1/models/other"),
            await client.post("/v1/completions", json={"model": "other", "prompt": "a"}),
        ):
            assert (reply.status_code, reply.json()["error"]["type"]) == (404, "NotFoundError")
        assert (await client.get("/version")).json() == {"version": "9.9", "dtype": "float32"}
        assert (await client.get("/nowhere")).json()["error"]["code"] == 404
        assert (await client.get("/v1/completions")).status_code == 405

    with_client(check, ScriptedEngine())


@pytest.mark.parametrize(
    ("model", "name"),
    [("models/demo-target", "demo-target"), ("./x/y", "y"), (".", Path.cwd().name), ("org/name", "org/name")],
)
def test_served_name(model: str, name: str) -> None:
    assert served_name(config(target={"model": model})) == name


@pytest.mark.parametrize("phase", ["loading", "warming_up", "draining", "failed"])
def test_not_ready(phase: str) -> None:
    engine = ScriptedEngine(phase=phase)

    async def check(client: httpx.AsyncClient) -> None:
        health = await client.get("/health")
        assert (health.status_code, health.json()["phase"]) == (503, phase)
        assert health.headers["retry-after"] == "5"
        assert (await client.head("/health")).status_code == 503
        assert 'reason="unavailable"} 0.0' in (await client.get("/metrics")).text, "a probe is no request"
        assert (await client.get("/health/live")).status_code == 200
        reply = await client.post("/v1/completions", json={"prompt": "a"})
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
        assert reply.json()["phase"] == phase
        assert reply.json()["error"]["type"] == "ServiceUnavailableError"

    with_client(check, engine)
    assert engine.requests == []


def test_draining_gateway_and_silent_engine() -> None:
    engine = ScriptedEngine()

    async def run() -> None:
        app = make_app(engine)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            assert (await client.get("/health")).json() == {"status": "ok", "phase": "ready", "detail": ""}
            app.state.gateway.drain()
            assert (await client.get("/health")).json()["phase"] == "draining"
            assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 503
            engine.status_error = DependencyError("actor died at 10.0.0.1")
            reply = await client.get("/health")
            assert (reply.status_code, reply.json()["phase"]) == (503, "failed")
            assert "10.0.0.1" not in reply.text

    asyncio.run(run())


def test_queue_full() -> None:
    engine = ScriptedEngine(other_load=3)

    async def check(client: httpx.AsyncClient) -> None:
        assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 200
        reply = await client.post("/v1/completions", json={"prompt": "a", "n": 2})
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
        assert reply.json()["error"]["type"] == "RateLimitError"

    with_client(check, engine)


def test_places_are_given_back() -> None:
    engine = ScriptedEngine(hold_after=0)

    async def check(client: httpx.AsyncClient) -> None:
        first = asyncio.create_task(client.post("/v1/completions", json={"prompt": ["a"] * 4}))
        await engine.holding.wait()
        assert (await client.post("/v1/completions", json={"prompt": "a", "stream": True})).status_code == 429
        engine.released.set()
        assert (await first).status_code == 200
        for stream in (True, False):
            assert (
                await client.post("/v1/completions", json={"prompt": ["a"] * 4, "stream": stream})
            ).status_code == 200

    with_client(check, engine)


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (RuntimeError("secret detail"), 500),
        ("secret detail", 500),
        (None, 500),
        (DependencyError("secret detail"), 503),
        (ValueError("prompt: too long"), 400),
    ],
)
def test_failures(failure: Exception | str | None, status: int) -> None:
    engine = ScriptedEngine(fail_after=1, failure=failure)

    async def check(client: httpx.AsyncClient) -> None:
        reply = await client.post("/v1/completions", json={"prompt": "a"})
        assert reply.status_code == status
        assert "secret" not in reply.text
        reply = await client.post("/v1/completions", json={"prompt": "a", "stream": True})
        assert reply.status_code == 200
        first, last = events(reply.text)
        assert first["choices"][0]["text"] == "he"
        assert last["error"]["code"] == status

    with_client(check, engine)


def test_one_failure_cancels_the_other_choices() -> None:
    engine = ScriptedEngine(fail_after=1, failure=RuntimeError("x"))

    async def check(client: httpx.AsyncClient) -> None:
        assert (await client.post("/v1/completions", json={"prompt": "a", "n": 3})).status_code == 500

    with_client(check, engine)
    assert set(engine.cancelled) >= {request.request_id for request in engine.requests[1:]}
    assert engine.running == 0


def test_api_key() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic right-key"}):
            for path in ("/v1/models", "/metrics", "/specblock/status", "/docs", "/nowhere"):
                reply = await client.get(path, headers=headers)
                assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
                assert reply.json()["error"]["type"] == "AuthenticationError"
                assert "x-request-id" in reply.headers
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.get("/healthy")).status_code == 401
        headers = {"authorization": "bearer right-key", "x-request-id": "mine-1"}
        reply = await client.post("/v1/completions", json={"prompt": "a"}, headers=headers)
        assert (reply.status_code, reply.headers["x-request-id"]) == (200, "mine-1")
        reply = await client.get("/v1/models", headers={**headers, "x-request-id": "bad id"})
        assert reply.headers["x-request-id"] != "bad id"

    with_client(check, ScriptedEngine(), http={"api_key": "right-key"})


def test_large_bodies() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        async def pieces() -> Any:
            for _ in range(5):
                yield b" " * (1 << 20)

        for content in (b" " * (5 << 20), pieces()):
            reply = await client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
            assert (reply.status_code, reply.json()["error"]["type"]) == (413, "RequestTooLargeError")

    with_client(check, ScriptedEngine())


def test_metrics_and_status() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        await client.post("/v1/completions", json={"prompt": "a"}, headers={"x-specblock-domain": "python"})
        await client.post("/v1/completions", json={"prompt": ""})
        reply = await client.get("/metrics")
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        samples = {
            (
                sample.name,
                sample.labels.get("reason") or sample.labels.get("domain") or sample.labels.get("arm"),
            ): sample
            for family in text_string_to_metric_families(reply.text)
            for sample in family.samples
        }
        assert samples["vllm:e2e_request_latency_seconds_count", None].value == 1
        assert samples["vllm:time_to_first_token_seconds_count", None].value == 1
        assert samples["vllm:inter_token_latency_seconds_count", None].value == 9, "11 tokens, 2 in the first chunk"
        assert samples["specblock_requests_total", "python"].value == 1
        assert samples["specblock_requests_rejected_total", "invalid"].value == 1
        assert samples["specblock_bandit_decisions_total", "skip"].value == 3
        assert samples["vllm:num_requests_running", None].labels["model_name"] == "org/m"
        status = (await client.get("/specblock/status")).json()
        assert (status["model"], status["version"], status["engine"]["phase"]) == ("org/m", "9.9", "ready")
        assert status["bandit"] == {"decisions_by_arm_total": {"skip": 3}}
        assert status["adaptation"] == {"enabled": True, "reason": ""}

    with_client(check, ScriptedEngine())


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"adaptation": {"enabled": False}}, "adaptation.enabled is false"),
        ({"drafter": {"kind": "prompt_lookup", "path": None}}, "the drafter has no weights; nothing to adapt"),
    ],
)
def test_status_says_why_adaptation_is_off(sections: dict[str, Any], reason: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        status = (await client.get("/specblock/status")).json()
        assert status["adaptation"] == {"enabled": False, "reason": reason}

    with_client(check, ScriptedEngine(), **sections)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_its_request(stream: bool) -> None:
    """Over a real socket: in-process transports have no connection to lose."""
    engine = ScriptedEngine(hold_after=1)

    async def run() -> None:
        app = make_app(engine)
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            assert not serving.done()
            await asyncio.sleep(0)
        port = server.servers[0].sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps({"prompt": "a", "stream": stream}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        writer.write(head.encode() + b"\r\n\r\n" + body)
        await engine.holding.wait()
        if stream:
            await reader.readuntil(b'"he"')
        assert engine.cancelled == []
        writer.close()
        await engine.cancel_seen.wait()
        assert engine.cancelled == [engine.requests[0].request_id]
        while app.state.gateway.admission.running:
            await asyncio.sleep(0)
        assert engine.running == 0
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            text = (await client.get("/metrics")).text
            assert 'specblock_requests_rejected_total{engine="0",model_name="org/m",reason="client_gone"} 1.0' in text
        server.should_exit = True
        await serving

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))

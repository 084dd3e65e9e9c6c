"""From a request body to the messages the engine understands: tokenising, limits, sampling parameters, seeds."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from specblock.cuda_ext.sampling import SamplingParams
from specblock.daemon.api_error import bad_request
from specblock.daemon.messages import GenerationRequest
from specblock.daemon.openai_schema import ChatBody, CompletionBody, GenerationBody

DOMAIN_HEADER = "x-specblock-domain"
COLLECT_HEADER = "x-specblock-collect"
_DOMAIN = re.compile(r"[A-Za-z0-9_.:/-]{1,64}")
_TOKEN_ID = re.compile(r"[0-9]{1,18}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_DEFAULT_MAX_TOKENS = 16
_GREEDY_BELOW = 1e-5
"""Temperatures below this mean arg-max, as in vLLM: dividing by them only overflows."""


@runtime_checkable
class TextCodec(Protocol):
    """The part of a tokenizer the gateway needs."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""

    @property
    def has_chat_template(self) -> bool:
        """True if ``encode_chat`` works."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids."""

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn."""


class TransformersCodec:
    """A transformers tokenizer as ``TextCodec``."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        """Token ids the tokenizer knows are below this; the model's output may be padded beyond it."""
        return len(self._tokenizer)

    @property
    def has_chat_template(self) -> bool:
        """True if the tokenizer ships one."""
        return getattr(self._tokenizer, "chat_template", None) is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with whatever the tokenizer puts in front of every text."""
        return [int(token) for token in self._tokenizer.encode(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation.

        Raises:
            ValueError: the template refuses it.
        """
        try:
            tokens = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=True, add_generation_prompt=True, return_dict=False
            )
        except Exception as error:  # templates raise jinja2 errors of many kinds, all of them about the messages
            raise ValueError(f"the chat template refuses these messages: {error}") from None
        return [int(token) for token in tokens]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request may ask for, in tokens."""

    max_context_tokens: int
    max_output_tokens: int
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The generations one HTTP request asks for.

    ``requests`` holds ``n`` entries per prompt, prompt by prompt; ``echo`` is empty or one text per entry.
    """

    requests: tuple[GenerationRequest, ...]
    prompt_tokens: int
    echo: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Prompt:
    tokens: tuple[int, ...]
    text: str = ""


def completion_batch(
    body: CompletionBody, headers: Mapping[str, str], request_id: str, codec: TextCodec, limits: Limits, seed: int
) -> Batch:
    """Turns a /v1/completions body into generations.

    Raises:
        ApiError: status 400, naming the field.
    """
    body.check()
    _check_text([entry for entry in body.prompts if isinstance(entry, str)], "prompt")
    if not all(body.prompts or ("",)):
        raise bad_request("prompt must not be empty", "prompt")
    prompts = []
    for entry in body.prompts:
        tokens = tuple(codec.encode(entry)) if isinstance(entry, str) else entry
        text = (entry if isinstance(entry, str) else codec.decode(entry)) if body.echo else ""
        prompts.append(_Prompt(_checked(tokens, limits, "prompt"), text))
    return _batch(body, prompts, headers, request_id, limits, seed, _DEFAULT_MAX_TOKENS)


def chat_batch(
    body: ChatBody, headers: Mapping[str, str], request_id: str, codec: TextCodec, limits: Limits, seed: int
) -> Batch:
    """Turns a /v1/chat/completions body into generations.

    Raises:
        ApiError: status 400, naming the field.
    """
    body.check()
    if not codec.has_chat_template:
        raise bad_request("this model's tokenizer has no chat template; use /v1/completions", "messages")
    _check_text([message.plain["content"] for message in body.messages], "messages")
    try:
        tokens = tuple(codec.encode_chat([message.plain for message in body.messages]))
    except ValueError as error:
        raise bad_request(str(error), "messages") from None
    if body.max_completion_tokens is not None:
        body = body.model_copy(update={"max_tokens": body.max_completion_tokens})
    prompt = _Prompt(_checked(tokens, limits, "messages"))
    return _batch(body, [prompt], headers, request_id, limits, seed, limits.max_output_tokens)


def fresh_seed(rng: random.Random) -> int:
    """A seed for a request that brought none: 63 random bits."""
    return rng.getrandbits(63)


def _check_text(texts: Sequence[str], param: str) -> None:
    """JSON can hold half of a surrogate pair, which is no character and breaks tokenizers."""
    if any(_SURROGATE.search(text) for text in texts):
        raise bad_request(f"{param} holds half of a surrogate pair, which is no character", param)


def _checked(tokens: tuple[int, ...], limits: Limits, param: str) -> tuple[int, ...]:
    if not tokens:
        raise bad_request(f"{param} must not be empty", param)
    if not all(0 <= token < limits.vocab_size for token in tokens):
        raise bad_request(f"{param} holds token ids outside 0 to {limits.vocab_size - 1}", param)
    if len(tokens) >= limits.max_context_tokens:
        raise bad_request(
            f"{param} has {len(tokens)} tokens; the context of {limits.max_context_tokens} tokens leaves no room "
            "for an answer",
            param,
        )
    return tokens


def _batch(
    body: GenerationBody,
    prompts: Sequence[_Prompt],
    headers: Mapping[str, str],
    request_id: str,
    limits: Limits,
    seed: int,
    default_max_tokens: int,
) -> Batch:
    domain = _domain(body, headers)
    collect = _collect(headers)
    stop_token_ids = tuple(body.stop_token_ids or ())
    if not all(0 <= token < limits.vocab_size for token in stop_token_ids):
        raise bad_request(f"stop_token_ids must lie between 0 and {limits.vocab_size - 1}", "stop_token_ids")
    requests = [
        GenerationRequest(
            request_id=f"{request_id}-{index * body.choices + choice}",
            prompt_tokens=prompt.tokens,
            sampling=_sampling(body, limits, seed, choice),
            max_tokens=_max_tokens(body, len(prompt.tokens), limits, default_max_tokens),
            stop=body.stop_strings,
            stop_token_ids=stop_token_ids,
            include_stop_str_in_output=body.include_stop_str_in_output,
            ignore_eos=body.ignore_eos,
            domain=domain,
            collect=collect,
        )
        for index, prompt in enumerate(prompts)
        for choice in range(body.choices)
    ]
    echo = tuple(prompt.text for prompt in prompts for _ in range(body.choices))
    return Batch(
        requests=tuple(requests),
        prompt_tokens=sum(len(prompt.tokens) for prompt in prompts),
        echo=echo if any(echo) else (),
    )


def _max_tokens(body: GenerationBody, prompt_tokens: int, limits: Limits, default: int) -> int:
    room = limits.max_context_tokens - prompt_tokens
    asked = body.max_tokens
    if asked is None:
        return min(default, room, limits.max_output_tokens)
    if not 1 <= asked <= limits.max_output_tokens:
        raise bad_request(f"max_tokens must be between 1 and {limits.max_output_tokens}", "max_tokens")
    if asked > room:
        raise bad_request(
            f"max_tokens = {asked} and {prompt_tokens} prompt tokens exceed the context of "
            f"{limits.max_context_tokens} tokens",
            "max_tokens",
        )
    return asked


def _sampling(body: GenerationBody, limits: Limits, seed: int, choice: int) -> SamplingParams:
    temperature = 1.0 if body.temperature is None else body.temperature
    given = {
        "temperature": 0.0 if 0 <= temperature < _GREEDY_BELOW else temperature,
        "top_p": body.top_p,
        "top_k": 0 if body.top_k == -1 else body.top_k,  # vLLM's other spelling of "keep all"
        "min_p": body.min_p,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
    }
    values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    bias = _logit_bias(body, limits)
    try:
        return SamplingParams(**values, logit_bias=bias, seed=seed if body.seed is None else body.seed, choice=choice)
    except ValueError as error:
        name, _, rule = str(error).partition(": ")
        raise bad_request(f"{name} {rule}", name) from None


def _logit_bias(body: GenerationBody, limits: Limits) -> tuple[tuple[int, float], ...]:
    pairs = []
    for key, bias in (body.logit_bias or {}).items():
        if not (_TOKEN_ID.fullmatch(key) and int(key) < limits.vocab_size):
            raise bad_request(f"logit_bias keys must be token ids below {limits.vocab_size}", "logit_bias")
        if not -100 <= bias <= 100:
            raise bad_request("logit_bias values must be between -100 and 100", "logit_bias")
        pairs.append((int(key), float(bias)))
    return tuple(sorted(pairs))


def _domain(body: GenerationBody, headers: Mapping[str, str]) -> str:
    from_header = headers.get(DOMAIN_HEADER)
    domain = from_header if from_header is not None else (body.metadata or {}).get("domain", "default")
    if not isinstance(domain, str) or not _DOMAIN.fullmatch(domain):
        param = DOMAIN_HEADER if from_header is not None else "metadata.domain"
        raise bad_request(f"{param} must be 1 to 64 letters, digits or _ . : / -", param)
    return domain


def _collect(headers: Mapping[str, str]) -> bool:
    value = headers.get(COLLECT_HEADER, "true").lower()
    if value not in ("true", "false"):
        raise bad_request(f"{COLLECT_HEADER} must be true or false", COLLECT_HEADER)
    return value == "true"

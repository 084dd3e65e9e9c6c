"""Bodies of /v1/completions and /v1/chat/completions: what is understood, refused, or accepted and ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from specblock.daemon.api_error import bad_request

MAX_STOP_STRINGS = 32
MAX_CHOICES = 128
# Fields of OpenAI or vLLM that change the answer and are not implemented, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "prompt_logprobs": (None,),
    "suffix": (None, ""),
    "min_tokens": (None, 0),
    "use_beam_search": (None, False),
    "skip_special_tokens": (None, True),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None,),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prompt_embeds": (None,),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
}
# Accepted without effect: they only label the request.
_IGNORED = frozenset({"user", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"})

Number = Annotated[float, Field(strict=True)]
Whole = Annotated[int, Field(strict=True)]
TokenIds = list[Whole]


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="allow")
    include_usage: bool = False


class GenerationBody(BaseModel):
    """Fields shared by both routes; ``None`` means the default."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    max_tokens: Whole | None = None
    n: Whole | None = None
    best_of: Whole | None = None
    seed: Whole | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Whole | None = None
    min_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    metadata: dict[str, Any] | None = None

    @property
    def choices(self) -> int:
        """Completions per prompt."""
        return 1 if self.n is None else self.n

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def unknown_fields(self) -> tuple[str, ...]:
        """Fields that neither OpenAI nor vLLM define, as far as this server knows."""
        return tuple(sorted(set(self.model_extra or {}) - set(_UNSUPPORTED) - _IGNORED))

    def check(self) -> None:
        """Rules that span fields or need a clear sentence.

        Raises:
            ApiError: status 400, naming the field.
        """
        for name, neutral in _UNSUPPORTED.items():
            value = (self.model_extra or {}).get(name)
            # `0 == False` in Python, but `logprobs: 0` asks for something.
            if not any(value == allowed and type(value) is type(allowed) for allowed in neutral):
                raise bad_request(f"{name} is not supported by this server", name)
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options is only allowed together with stream: true", "stream_options")
        if not 1 <= self.choices <= MAX_CHOICES:
            raise bad_request(f"n must be between 1 and {MAX_CHOICES}", "n")
        if self.best_of is not None and self.best_of != self.choices:
            raise bad_request("best_of other than n is not supported by this server", "best_of")
        if "" in self.stop_strings or len(self.stop_strings) > MAX_STOP_STRINGS:
            raise bad_request(f"stop must hold at most {MAX_STOP_STRINGS} strings, none of them empty", "stop")


class CompletionBody(GenerationBody):
    """Body of /v1/completions."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    echo: bool = False

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """One entry per prompt: text or token ids."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        flat = tuple(entry for entry in self.prompt if isinstance(entry, int))
        if flat:
            return (flat,)
        return tuple(
            entry if isinstance(entry, str) else tuple(entry) for entry in self.prompt if not isinstance(entry, int)
        )


class TextPart(BaseModel):
    """One part of a message's content; only text is served."""

    model_config = ConfigDict(extra="allow")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: str
    content: str | list[TextPart] | None = None

    @property
    def plain(self) -> dict[str, str]:
        """What a chat template reads."""
        parts = self.content or ""
        return {
            "role": self.role,
            "content": parts if isinstance(parts, str) else "".join(part.text for part in parts),
        }


class ChatBody(GenerationBody):
    """Body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Whole | None = None

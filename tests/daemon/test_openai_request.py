"""The demo target's own tokenizer behind the gateway's codec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from specblock.daemon.api_error import ApiError
from specblock.daemon.openai_request import Limits, TextCodec, TransformersCodec, completion_batch
from specblock.daemon.openai_schema import CompletionBody

TARGET = Path(__file__).parents[2] / "models" / "demo-target"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TARGET)


def test_text_survives_the_round_trip(tokenizer: Any) -> None:
    codec = TransformersCodec(tokenizer)
    text = "def f(x):\n    return x + 1  # grüße, 世界 🎉\n"
    tokens = codec.encode(text)
    assert codec.decode(tokens) == text
    assert all(isinstance(token, int) and 0 <= token < codec.vocab_size for token in tokens)
    assert codec.encode("") == []


def test_it_is_a_codec_and_the_tokenizer_alone_is_not(tokenizer: Any) -> None:
    assert isinstance(TransformersCodec(tokenizer), TextCodec)
    assert not isinstance(tokenizer, TextCodec)


@pytest.mark.parametrize("prompt", ["a\ud800b", ["ok", "\udfff"]])
def test_half_a_surrogate_pair_is_a_bad_request(tokenizer: Any, prompt: Any) -> None:
    limits = Limits(max_context_tokens=64, max_output_tokens=8, vocab_size=4096)
    with pytest.raises(ApiError, match="surrogate"):
        completion_batch(CompletionBody(prompt=prompt), {}, "r", TransformersCodec(tokenizer), limits, 1)


def test_chat_templates(tokenizer: Any) -> None:
    codec = TransformersCodec(tokenizer)
    assert not codec.has_chat_template
    tokenizer.chat_template = TEMPLATE
    try:
        assert codec.has_chat_template
        tokens = codec.encode_chat([{"role": "user", "content": "hi"}])
        assert codec.decode(tokens) == "user: hi\nassistant:"
        tokenizer.chat_template = "{{ raise_exception('only users may speak') }}"
        with pytest.raises(ValueError, match="only users may speak"):
            codec.encode_chat([{"role": "system", "content": "x"}])
    finally:
        tokenizer.chat_template = None

"""Streamed text against plain decoding of the whole run, cut by a definition without any streaming."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specblock.verifier.text import TextStream

END = 256 + 6  # id of the special token


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """All 256 bytes, a few merges that cross word and character borders, one special token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    space, newline = "\u0120", "\u010a"
    merges = [("a", "b"), ("ab", "c"), (space, "a"), (newline, newline), ("c", space), ("\u00f0", "\u0141")]
    tokens = [*letters, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    assert fast.eos_token_id == END
    return fast


TOKENIZER = byte_level_tokenizer()


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def certain(tokens: list[int]) -> str:
    """The text of some tokens without an unfinished character at the end."""
    text = TOKENIZER.decode(tokens, skip_special_tokens=True)
    return text[:-1] if text.endswith("\ufffd") else text


def expected(tokens: list[int], stop: tuple[str, ...], include_stop: bool) -> tuple[str, int]:
    """Text and kept tokens: cut when, token by token, the first stop string is complete."""
    for count in range(1, len(tokens) + 1):
        text = certain(tokens[:count])
        found = [(text.find(string), len(string)) for string in stop if string in text]
        if found:
            start, length = min(found)
            return text[: start + length if include_stop else start], count
    return TOKENIZER.decode(tokens, skip_special_tokens=True), len(tokens)


TEXTS = st.text(alphabet="abc \n\u00e9\U0001f600\u4e16", max_size=24)
STOPS = st.lists(st.text(alphabet="abc \n\u00e9\U0001f600", min_size=1, max_size=4), max_size=3).map(tuple)


@given(text=TEXTS, stop=STOPS, include=st.booleans(), cuts=st.lists(st.integers(1, 5), max_size=30))
@settings(max_examples=600, deadline=None)
def test_stream_equals_the_definition_however_tokens_arrive(text, stop, include, cuts):
    tokens = ids(text)
    wanted, wanted_count = expected(tokens, stop, include)
    stream = TextStream(TOKENIZER, stop, include)
    shown, kept, rest, stopped = "", 0, tokens, False
    for size in [*cuts, max(1, len(tokens))]:
        part, rest = rest[:size], rest[size:]
        delta = stream.push(part)
        shown += delta.text
        kept += delta.kept_tokens
        stopped = delta.stopped
        assert wanted.startswith(shown), "text must never be taken back"
        if stopped:
            break
        ready = certain(tokens[: len(tokens) - len(rest)])
        assert len(shown) > len(ready) - max(map(len, stop), default=1), "no more is held back than a stop string needs"
    shown += stream.finish()
    assert (shown, kept) == (wanted, wanted_count)
    assert stopped == (wanted_count < len(tokens) or any(s in certain(tokens) for s in stop))


@given(st.lists(st.integers(0, END), max_size=20))
@settings(max_examples=300, deadline=None)
def test_any_bytes_join_to_the_text_of_the_whole_run(tokens):
    stream = TextStream(TOKENIZER)
    pieces = [stream.push([token]).text for token in tokens]
    assert "".join(pieces) + stream.finish() == TOKENIZER.decode(tokens, skip_special_tokens=True)


def test_a_character_of_four_bytes_appears_at_once():
    stream = TextStream(TOKENIZER)
    tokens = ids("\U0001f600")
    assert len(tokens) == 3, "the tokenizer must split the character for this test to mean anything"
    assert [stream.push([token]).text for token in tokens] == ["", "", "\U0001f600"]


def test_an_unfinished_character_is_shown_as_such_at_the_end():
    stream = TextStream(TOKENIZER)
    assert stream.push(ids("a\u00e9")[:-1]).text == "a"
    assert stream.finish() == "\ufffd"


def test_partial_stop_strings_are_held_back_and_given_back():
    stream = TextStream(TOKENIZER, ("c\n\n",))
    assert stream.push(ids("bc")).text == "b"
    assert stream.push(ids("\n")).text == ""
    assert stream.push(ids("b")).text == "c\nb"
    assert stream.push(ids("c")).text == ""
    assert stream.finish() == "c"


@pytest.mark.parametrize(("include", "text"), [(False, "b"), (True, "bca")])
def test_stop_inside_a_run_tells_how_many_tokens_stay(include, text):
    stream = TextStream(TOKENIZER, ("ca",), include)
    delta = stream.push([*ids("b"), *ids("c"), *ids("a"), *ids("b"), *ids("b")])
    assert (delta.text, delta.stopped, delta.kept_tokens) == (text, True, 3)
    assert stream.push(ids("b")).text == ""
    assert stream.finish() == ""


def test_the_earliest_of_several_stop_strings_wins():
    delta = TextStream(TOKENIZER, ("c", "abc", "bc")).push(ids("abc"))
    assert (delta.text, delta.stopped) == ("", True), "one token completes all three; the first to start counts"
    delta = TextStream(TOKENIZER, ("b", "cab")).push(ids("c") + ids("a") + ids("b"))
    assert (delta.text, delta.stopped, delta.kept_tokens) == ("", True, 3)


def test_of_two_stop_strings_that_start_together_the_shorter_is_complete_first():
    for stop in (("ab", "a"), ("a", "ab")):
        assert TextStream(TOKENIZER, stop, include_stop=True).push(ids("ab")).text == "a"


def test_special_tokens_are_left_out_unless_asked_for():
    tokens = [*ids("a"), END, *ids("b")]
    assert TextStream(TOKENIZER).push(tokens).text == "ab"
    assert TextStream(TOKENIZER, skip_special_tokens=False).push(tokens).text == "a<|end|>b"


def test_the_prompt_is_context_but_not_text():
    stream = TextStream(TOKENIZER, prompt_tokens=ids("abc abc abc"))
    assert stream.push(ids(" abc")).text == " abc"


def test_empty_stop_strings_are_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        TextStream(TOKENIZER, ("a", ""))

"""Token ids to streamed text: incremental detokenisation and stop strings.

Both work token by token, so what is kept never depends on how many tokens arrive at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_PARTIAL = "\ufffd"  # what a tokenizer prints for bytes that are not (yet) valid UTF-8
_PROMPT_TAIL_TOKENS = 6


class Detokenizer:
    """Turns token ids into text as they come; the pieces join to the text of the whole run.

    A piece is held back while it ends in an incomplete UTF-8 sequence. Each piece is decoded behind the piece before
    it, because some tokenizers treat the first token of a text differently.

    Source: prefix-offset technique of text-generation-inference and vLLM.
    """

    def __init__(self, tokenizer: Any, prompt_tokens: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context = list(prompt_tokens[-_PROMPT_TAIL_TOKENS:])
        self._pending: list[int] = []
        self._context_text = self._decode(self._context)

    def push(self, token: int) -> str:
        """The text that is certain after one more token (often empty)."""
        self._pending.append(token)
        text = self._decode(self._context + self._pending)
        if text.endswith(_PARTIAL) or len(text) < len(self._context_text):
            return ""
        return self._settle(text)

    def flush(self) -> str:
        """What was held back, now that no more tokens come."""
        return self._settle(self._decode(self._context + self._pending))

    def _settle(self, text: str) -> str:
        new = text[len(self._context_text) :]
        if new:  # special tokens decode to nothing: keep the last visible piece as context
            self._context, self._pending = self._pending, []
            self._context_text = self._decode(self._context)
        return new

    def _decode(self, tokens: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                tokens, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )


class StopMatcher:
    """Finds the earliest stop string in a stream and holds back text that may become one."""

    def __init__(self, stop: Sequence[str] = (), include_stop: bool = False) -> None:
        """Args: stop strings (none empty), and whether the one found stays in the text.

        Raises:
            ValueError: a stop string is empty.
        """
        if any(not string for string in stop):
            raise ValueError("stop: strings must not be empty")
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that may be shown now; after a match ``stopped`` is True and nothing more comes."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(text.find(string), len(string)) for string in self._stop if string in text]
        if found:
            start, length = min(found)
            self.stopped, self._held = True, ""
            return text[: start + length if self._include_stop else start]
        keep = max((_overlap(text, string) for string in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Text held back for a match that never completed."""
        held, self._held = self._held, ""
        return held


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that became certain with some tokens.

    Attributes:
        text: to append to the output.
        stopped: a stop string was completed.
        kept_tokens: how many of the pushed tokens belong to the completion: all, or up to the end of a stop string.
    """

    text: str
    stopped: bool
    kept_tokens: int


class TextStream:
    """A request's output text: detokeniser and stop strings together."""

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        *,
        prompt_tokens: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        """Starts an empty text.

        Args:
            tokenizer: a transformers tokenizer.
            stop: strings that end the text, none empty.
            include_stop: whether the one found stays in the text.
            prompt_tokens: what came before; its end is context for the first token.
            skip_special_tokens: leave special tokens out of the text.

        Raises:
            ValueError: a stop string is empty.
        """
        self._detokenizer = Detokenizer(tokenizer, prompt_tokens, skip_special_tokens)
        self._matcher = StopMatcher(stop, include_stop)

    def push(self, tokens: Sequence[int]) -> TextDelta:
        """Adds tokens in order; those after a completed stop string are ignored."""
        pieces: list[str] = []
        for index, token in enumerate(tokens):
            pieces.append(self._matcher.push(self._detokenizer.push(token)))
            if self._matcher.stopped:
                return TextDelta("".join(pieces), True, index + 1)
        return TextDelta("".join(pieces), False, len(tokens))

    def finish(self) -> str:
        """The rest of the text when the request ended otherwise (end of text, length); empty after a stop string."""
        if self._matcher.stopped:
            return ""
        text = self._matcher.push(self._detokenizer.flush())
        return text if self._matcher.stopped else text + self._matcher.flush()


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``string``."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0

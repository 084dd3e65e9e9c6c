"""Where a run of chosen tokens ends: end of text, stop tokens and the token limit, inside an accepted path too."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ending:
    """The verdict on a run of tokens.

    Attributes:
        num_kept: leading tokens that belong to the completion (a terminator counts, as in usage figures).
        num_shown: leading tokens whose text belongs to the output (the terminator excluded).
        finish_reason: "stop", "length", or None if the request goes on.
    """

    num_kept: int
    num_shown: int
    finish_reason: str | None


def truncate_at_end(
    tokens: Sequence[int],
    *,
    tokens_left: int,
    eos_token_ids: Set[int] = frozenset(),
    stop_token_ids: Set[int] = frozenset(),
    ignore_eos: bool = False,
) -> Ending:
    """Cuts newly chosen tokens at the first thing that ends the request.

    Args:
        tokens: new tokens in order.
        tokens_left: how many more tokens the request may produce, at least 1.
        eos_token_ids: the target's end-of-text tokens.
        stop_token_ids: further tokens at which this request stops.
        ignore_eos: go on through end-of-text tokens (stop tokens still stop).

    Returns:
        A terminator that is also the last allowed token finishes with "stop".
    """
    terminators = set(stop_token_ids) if ignore_eos else set(stop_token_ids) | set(eos_token_ids)
    for index, token in enumerate(tokens[:tokens_left]):
        if token in terminators:
            return Ending(index + 1, index, "stop")
    if len(tokens) >= tokens_left:
        return Ending(tokens_left, tokens_left, "length")
    return Ending(len(tokens), len(tokens), None)

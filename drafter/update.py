"""What an online update does to a drafter: gradients for most arms, counting for token bias and token pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from typing import Protocol

from specblock.drafter.counting import TOKEN_BIAS, TokenBiasRun
from specblock.drafter.network import DraftNetwork
from specblock.drafter.token_pairs import TOKEN_PAIRS, TokenPairsRun
from specblock.drafter.train import TrainRun, TrainSettings
from specblock.drafter.window import Window


class UpdateRun(Protocol):
    """A resumable update over a float32 master model."""

    model: DraftNetwork
    done: int
    """Steps so far."""
    positions: int
    """Labelled positions seen so far."""
    rehearses: bool
    """Whether it needs text of every kind lest it spoils the others."""

    def batches(self, windows: Sequence[Window]) -> Iterator[list[Window]]:
        """Endless batches from step ``done`` on."""

    def step(self, windows: Sequence[Window]) -> object:
        """One step on one batch."""


def update_run(model: DraftNetwork, settings: TrainSettings) -> UpdateRun:
    """The run that moves ``settings.patterns``; ``token_bias.*`` moves alone, and ``learning_rate`` is then a share.

    Raises:
        ValueError: no parameter matches, or ``token_bias.*`` together with others.
    """
    if settings.patterns == (TOKEN_PAIRS,):
        return TokenPairsRun(model, settings.batch_windows, settings.seed)
    if TOKEN_BIAS not in settings.patterns:
        return TrainRun(model, settings)
    if settings.patterns != (TOKEN_BIAS,):
        raise ValueError(f"{TOKEN_BIAS} is counted, not trained: give it an arm of its own")
    return TokenBiasRun(model, settings.batch_windows, settings.learning_rate, settings.seed)


def counts_beside(patterns: Sequence[str]) -> bool:
    """Whether an update that trains by gradient counts token pairs as well: it costs next to nothing."""
    return tuple(patterns) != (TOKEN_PAIRS,) and any(fnmatch("token_pairs.counts", pattern) for pattern in patterns)

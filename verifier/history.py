"""What a request's next token depends on besides the target: sampling parameters, seen tokens, logit bias.

Legend: N rows, V vocabulary, J requests with penalties or biases.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specblock.cuda_ext.sampling import SamplingParams


class ChoiceState:
    """One request's sampling parameters and, only where they matter, its token counts.

    Attributes:
        params: the sampling parameters.
        bias_V: float64 [V] additive logit bias, or None if the request needs no adjustment.
        prompt_V: bool [V], tokens of the prompt, or None.
        count_V: float64 [V], occurrences among generated tokens, or None.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_tokens: Sequence[int],
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Starts a request.

        Args:
            params: how its tokens are chosen.
            prompt_tokens: tokens that count as seen for the repetition penalty.
            vocab_size: V.
            device: where to keep the counts (the device of the logits saves a copy per cycle).

        Raises:
            ValueError: a biased token is outside the vocabulary.
        """
        self.params = params
        self.bias_V: Tensor | None = None
        self.prompt_V: Tensor | None = None
        self.count_V: Tensor | None = None
        for token, _ in params.logit_bias:
            if token >= vocab_size:
                raise ValueError(f"logit_bias: token {token} is outside the vocabulary of {vocab_size} tokens")
        if not (params.needs_history or params.logit_bias):
            return
        bias = torch.zeros(vocab_size, dtype=torch.float64)
        for token, value in params.logit_bias:
            bias[token] += value
        prompt = torch.zeros(vocab_size, dtype=torch.bool)
        prompt[torch.tensor(prompt_tokens, dtype=torch.int64)] = True
        self.bias_V, self.prompt_V = bias.to(device), prompt.to(device)
        self.count_V = torch.zeros(vocab_size, dtype=torch.float64, device=device)

    @property
    def adjusts(self) -> bool:
        """True when logits must be changed before the distribution is formed."""
        return self.count_V is not None

    def append(self, tokens: Sequence[int]) -> None:
        """Counts tokens that became part of the text."""
        if self.count_V is not None:
            index = torch.tensor(tokens, dtype=torch.int64, device=self.count_V.device)
            self.count_V.index_add_(0, index, torch.ones_like(index, dtype=torch.float64))


class PathHistory:
    """Token counts of several requests while a walk goes down their trees; the states themselves stay untouched."""

    def __init__(self, states: Sequence[ChoiceState], device: torch.device | str = "cpu") -> None:
        self._place = {member: place for place, member in enumerate(m for m, s in enumerate(states) if s.adjusts)}
        adjusted = [states[member] for member in self._place]
        if not adjusted:
            return
        self._bias_JV = torch.stack([s.bias_V.to(device) for s in adjusted if s.bias_V is not None])
        self._prompt_JV = torch.stack([s.prompt_V.to(device) for s in adjusted if s.prompt_V is not None])
        self._count_JV = torch.stack([s.count_V.to(device) for s in adjusted if s.count_V is not None])
        names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
        columns = [[[getattr(s.params, name)] for s in adjusted] for name in names]
        self._penalties = torch.tensor(columns, dtype=torch.float64, device=device)

    def adjust(self, members: Sequence[int], logits_NV: Tensor) -> Tensor:
        """Applies bias, repetition, frequency and presence penalties, in that order, to rows of ``members``.

        Args:
            members: which request each row belongs to.
            logits_NV: raw logits [N, V].

        Returns:
            The same tensor if no row needs it, else float64 [N, V].

        Source: order and formulas of transformers' (bias before repetition) and vLLM's processors.
        """
        rows = [row for row, member in enumerate(members) if member in self._place]
        if not rows:
            return logits_NV
        place = torch.tensor([self._place[members[row]] for row in rows], device=logits_NV.device)
        repetition, frequency, presence = self._penalties[:, place]
        count = self._count_JV[place]
        adjusted = logits_NV.to(torch.float64, copy=True)
        biased = adjusted[rows] + self._bias_JV[place]
        repeated = torch.where(biased < 0, biased * repetition, biased / repetition)
        biased = torch.where(self._prompt_JV[place] | (count > 0), repeated, biased)
        adjusted[rows] = biased - frequency * count - presence * (count > 0)
        return adjusted

    def append(self, members: Sequence[int], tokens: Sequence[int]) -> None:
        """Counts one visited token for each of ``members``."""
        pairs = [(self._place[m], token) for m, token in zip(members, tokens, strict=True) if m in self._place]
        if pairs:
            place, token = torch.tensor(pairs, device=self._count_JV.device).unbind(1)
            self._count_JV[place, token] += 1

"""One request inside the engine: tokens, pending drafter positions, text, limits, what it leaves for learning."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specblock.bandit.events import NUM_RANK_BUCKETS, rank_bucket
from specblock.daemon.messages import GenerationRequest, RequestStats
from specblock.drafter.window import Window
from specblock.verifier.finish import truncate_at_end
from specblock.verifier.history import ChoiceState
from specblock.verifier.result import TopLogProbs
from specblock.verifier.text import TextStream


@dataclass(slots=True)
class CycleCounts:
    """Sums over some cycles of one request.

    ``histogram[a]`` counts cycles that accepted ``a`` drafts; ``ranks`` is the event's ``rank_histogram``.
    """

    histogram: list[int] = field(default_factory=lambda: [0] * 9)
    ranks: list[int] = field(default_factory=lambda: [0] * NUM_RANK_BUCKETS)
    cycles: int = 0
    committed: int = 0
    draft_nodes: int = 0
    drafter_forwards: int = 0
    drafting_cycles: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0
    other_s: float = 0.0

    def add(self, accepted: int, kept: int, nodes: int, forwards: int, rank: int) -> None:
        """Counts one cycle that kept ``kept`` tokens out of ``accepted`` drafts and the bonus.

        ``rank`` is that of the target's token where acceptance stopped, -1 if there was nothing to rank.
        """
        while len(self.histogram) <= accepted:
            self.histogram.append(0)
        self.histogram[accepted] += 1
        if rank >= 0:
            self.ranks[rank_bucket(rank)] += 1
        self.cycles += 1
        self.committed += kept
        self.draft_nodes += nodes
        self.drafter_forwards += forwards
        self.drafting_cycles += forwards > 0

    def spend(self, draft_s: float, verify_s: float, other_s: float) -> None:
        """Adds this request's share of a cycle's seconds."""
        self.draft_s += draft_s
        self.verify_s += verify_s
        self.other_s += other_s


@dataclass(frozen=True, slots=True)
class Kept:
    """What of one verified path belongs to a completion; ``finish_reason`` is None while the request goes on."""

    tokens: tuple[int, ...]
    text: str
    finish_reason: str | None


def check_request(request: GenerationRequest, vocab_size: int, capacity_tokens: int) -> None:
    """Refuses what cannot be decoded in a slot of ``capacity_tokens`` tokens.

    Raises:
        ValueError: the prompt is empty or holds ids outside the vocabulary, there is nothing to produce, or the
            request is longer than a slot.
    """
    if not request.prompt_tokens:
        raise ValueError("prompt: must not be empty")
    if min(request.prompt_tokens) < 0 or max(request.prompt_tokens) >= vocab_size:
        raise ValueError(f"prompt: token ids must be between 0 and {vocab_size - 1}")
    if request.max_tokens < 1:
        raise ValueError("max_tokens: must be at least 1")
    if len(request.prompt_tokens) + request.max_tokens > capacity_tokens:
        raise ValueError(
            f"prompt ({len(request.prompt_tokens)} tokens) plus max_tokens ({request.max_tokens}) is over the "
            f"context length of {capacity_tokens} tokens"
        )


class RequestState:
    """Mutable state of a running request; owned by the engine's loop alone."""

    def __init__(
        self,
        request: GenerationRequest,
        text: TextStream | None,
        vocab_size: int,
        submitted_s: float,
        device: torch.device,
    ) -> None:
        self.request = request
        self.text = text
        self.choice = ChoiceState(request.sampling, request.prompt_tokens, vocab_size, device)
        self.submitted_s = submitted_s
        self.started_s = 0.0
        self.decoding_since_s = 0.0
        self.slot = -1
        self.tokens: list[int] = list(request.prompt_tokens)
        self.prefilled = 0  # prompt tokens in the target cache; the last prompt token is the first root
        self.pending: list[Tensor] = []  # features not yet absorbed by the drafter, [n, F] each
        self.total = CycleCounts()
        self.segment = CycleCounts()
        self.segments_sent = 0
        self.accepted: list[int] = []
        self.plans: list[tuple[int, ...]] = []  # one per cycle; the node budget is 0 without drafts
        self.versions: list[str] = []
        self.segment_versions: list[str] = []
        self.speculative = True
        self.flagged = False
        self._features: list[Tensor] = []
        self._top_ids: list[Tensor] = []
        self._top_log_probs: list[Tensor] = []

    @property
    def generated(self) -> int:
        """Tokens produced so far."""
        return len(self.tokens) - len(self.request.prompt_tokens)

    @property
    def tokens_left(self) -> int:
        """Tokens the request may still produce."""
        return self.request.max_tokens - self.generated

    @property
    def prefill_done(self) -> bool:
        """True when every prompt token but the last is in the cache."""
        return self.prefilled >= len(self.request.prompt_tokens) - 1

    def take(self, path: Sequence[int], eos_token_ids: Set[int]) -> Kept:
        """Appends the tokens of an accepted path up to whatever ends the request in it."""
        ending = truncate_at_end(
            path,
            tokens_left=self.tokens_left,
            eos_token_ids=eos_token_ids,
            stop_token_ids=frozenset(self.request.stop_token_ids),
            ignore_eos=self.request.ignore_eos,
        )
        count, reason, text = ending.num_kept, ending.finish_reason, ""
        if self.text is not None:
            piece = self.text.push(path[: ending.num_shown])
            text = piece.text
            if piece.stopped:
                count, reason = piece.kept_tokens, "stop"
            elif reason is not None:
                text += self.text.finish()
        tokens = tuple(path[:count])
        self.tokens.extend(tokens)
        self.choice.append(tokens)
        return Kept(tokens, text, reason)

    def keep_features(self, features: Tensor, for_drafter: bool) -> None:
        """Remembers features of newly consumed tokens [n, F] for the drafter and for the window."""
        if for_drafter:
            self.pending.append(features)
        if self.request.collect:
            self._features.append(features)

    def keep_laws(self, top: TopLogProbs, row: int, count: int) -> None:
        """Remembers the target's laws of the ``count`` tokens kept this cycle."""
        if self.request.collect:
            self._top_ids.append(top.ids[row, :count].to(torch.int32))
            self._top_log_probs.append(top.log_probs[row, :count].to(torch.float16))

    def window(self, now_s: float, heldout: bool, max_tokens: int) -> Window | None:
        """The training window of the finished request, or None if there is nothing to learn from.

        Its tensors are on the host: windows outlive requests, and the trainer's process may not see the device.
        """
        if not self.request.collect or not self._top_ids:
            return None
        prompt = len(self.request.prompt_tokens)
        size = min(len(self.tokens), max_tokens)
        if size <= prompt:
            return None
        return Window(
            conversation_id=self.request.request_id,
            domain=self.request.domain,
            time_s=now_s,
            drafter_version=self.versions[-1] if len(self.versions) == 1 and not self.flagged else "",
            heldout=heldout,
            tokens=torch.tensor(self.tokens[:size], dtype=torch.int32),
            prompt_tokens=prompt,
            features=torch.cat(self._features)[: size - 1].to("cpu", copy=True),
            top_ids=torch.cat(self._top_ids)[: size - prompt].to("cpu", copy=True),
            top_log_probs=torch.cat(self._top_log_probs)[: size - prompt].to("cpu", copy=True),
            sampling=self.request.sampling,
            accepted=tuple(self.accepted) if size == len(self.tokens) else (),
            plans=tuple(self.plans) if size == len(self.tokens) else (),
            truncated=size < len(self.tokens),
        )

    def stats(self, now_s: float) -> RequestStats:
        """What the request did, for its last chunk."""
        return RequestStats(
            prompt_tokens=len(self.request.prompt_tokens),
            completion_tokens=self.generated,
            cycles=self.total.cycles,
            draft_tokens=self.total.draft_nodes,
            accepted_tokens=sum(a * n for a, n in enumerate(self.total.histogram)),
            acceptance_histogram=tuple(self.total.histogram),
            queue_s=max(0.0, (self.started_s if self.slot >= 0 else now_s) - self.submitted_s),
            prefill_s=max(0.0, self.decoding_since_s - self.started_s),
            decode_s=max(0.0, now_s - self.decoding_since_s) if self.decoding_since_s else 0.0,
            drafter_version=self.versions[-1] if self.versions else "",
            drafter_forwards=self.total.drafter_forwards,
            drafting_cycles=self.total.drafting_cycles,
            draft_s=self.total.draft_s,
            verify_s=self.total.verify_s,
            other_s=self.total.other_s,
        )

"""The decode loop: admit, prefill, then draft -> verify -> commit -> emit for all running requests at once.

A plain class without Ray, Redis or threads: ``step`` is one cycle. Nothing in it waits for learning or disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specblock.cuda_ext.noise import NoiseWindow
from specblock.cuda_ext.ops import rank_of_choice
from specblock.cuda_ext.sampling import SamplingBatch
from specblock.cuda_ext.tree import DraftTree, Offers, place_rows, root_only
from specblock.daemon.messages import GenerationRequest, TokenChunk
from specblock.daemon.request import CycleCounts, RequestState
from specblock.daemon.speculation import Participant
from specblock.daemon.tree_planner import CycleResult, TreePlanner
from specblock.drafter.interface import AnyDrafter, NewPositions
from specblock.drafter.plan import NO_SPECULATION, DraftPlan
from specblock.verifier.finish import truncate_at_end
from specblock.verifier.model import TargetModel
from specblock.verifier.result import VerifyResult
from specblock.verifier.text import TextStream
from specblock.verifier.verify import verify

Clock = Callable[[], float]
_Finished = tuple[RequestState, tuple[int, ...], str, str]
"""(state, last tokens, last text, reason)."""
_CATCH_UP_POSITIONS = 256  # drafter positions per forward when a request speculates again after a pause


@dataclass(frozen=True, slots=True)
class _Drafted:
    """A cycle's trees for the whole batch: which requests drafted, with which sizes, how deep trees can be.

    ``offers`` are those of the requests that drafted, None if there are none.
    """

    tree: DraftTree
    max_depth: int
    plan: DraftPlan
    speculate: tuple[bool, ...]
    offers: Offers | None

    def ranks(self, result: VerifyResult) -> list[int]:
        """Per request of the batch, ``rank_of_choice`` where acceptance stopped; -1 for those that did not draft."""
        ranks = [-1] * len(self.speculate)
        if self.offers is None:
            return ranks
        members = [row for row, yes in enumerate(self.speculate) if yes]
        last = [result.num_accepted[row] for row in members]
        member_D, last_D = torch.tensor([members, last], device=self.tree.token.device)
        rank_D = rank_of_choice(self.offers, result.rows[member_D, last_D], result.tokens[member_D, last_D])
        for row, rank in zip(members, rank_D.tolist(), strict=True):
            ranks[row] = rank
        return ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Sizes of the decode loop.

    Attributes:
        slots: requests decoded together.
        capacity_tokens: tokens per slot, prompt and completion.
        prefill_chunk_tokens: prompt tokens per forward.
        top_k: target log-probabilities kept per choice for training.
        segment_cycles: cycles per acceptance event.
    """

    slots: int
    capacity_tokens: int
    prefill_chunk_tokens: int = 256
    top_k: int = 32
    segment_cycles: int = 32


class Listener:
    """What the engine tells the outside; the default ignores everything. Calls must return at once."""

    def segment(self, state: RequestState, last: bool) -> None:
        """A request finished ``segment_cycles`` cycles or ended; ``state.segment`` holds the sums."""

    def finished(self, state: RequestState, reason: str) -> None:
        """A request ended; its window may be taken."""


class Engine:
    """Verifier and inference drafter behind one loop with slots."""

    def __init__(
        self,
        target: TargetModel,
        drafter: AnyDrafter | None,
        settings: EngineSettings,
        clock: Clock,
        listener: Listener | None = None,
        drafter_version: str = "",
        planner: TreePlanner | None = None,
    ) -> None:
        """Args:
        target: verifies.
        drafter: drafts; None is plain decoding.
        settings: sizes.
        clock: seconds.
        listener: told about segments and finished requests.
        drafter_version: name of the drafter's weights.
        planner: chooses tree sizes per cycle; None takes the drafter's fixed ones.
        """
        self.target, self.drafter, self.settings, self.planner = target, drafter, settings, planner
        self.drafter_version = drafter_version
        self.speculation = drafter is not None
        self._clock, self._listener = clock, listener or Listener()
        depth = drafter.max_depth if drafter else 0
        self._cache = target.new_cache(settings.slots, settings.capacity_tokens + self._tree_rows)
        self._draft_cache: Any = drafter.new_cache(settings.slots, settings.capacity_tokens) if drafter else None
        self._noise = NoiseWindow(settings.slots, depth + 1, target.vocab_size, target.device)
        self.waiting: deque[RequestState] = deque()
        self.running: list[RequestState] = []
        self._pending_swap: Callable[[], bool] | None = None

    @property
    def _tree_rows(self) -> int:
        return self.drafter.settings.node_budget + 1 if self.drafter else 1

    @property
    def idle(self) -> bool:
        """True when there is nothing to decode."""
        return not self.waiting and not self.running

    def submit(self, request: GenerationRequest) -> None:
        """Queues a request; prompt and completion must fit a slot.

        Raises:
            ValueError: the prompt is empty or holds ids outside the vocabulary, there is nothing to produce, or the
                request is longer than a slot.
        """
        if not request.prompt_tokens:
            raise ValueError("prompt: must not be empty")
        if min(request.prompt_tokens) < 0 or max(request.prompt_tokens) >= self.target.vocab_size:
            raise ValueError(f"prompt: token ids must be between 0 and {self.target.vocab_size - 1}")
        if request.max_tokens < 1:
            raise ValueError("max_tokens: must be at least 1")
        if len(request.prompt_tokens) + request.max_tokens > self.settings.capacity_tokens:
            raise ValueError(
                f"prompt ({len(request.prompt_tokens)} tokens) plus max_tokens ({request.max_tokens}) is over the "
                f"context length of {self.settings.capacity_tokens} tokens"
            )
        text = None
        if self.target.tokenizer is not None:
            text = TextStream(
                self.target.tokenizer,
                prompt_tokens=request.prompt_tokens,
                stop=request.stop,
                include_stop=request.include_stop_str_in_output,
            )
        state = RequestState(request, text, self.target.vocab_size, self._clock(), self.target.device)
        self.waiting.append(state)

    def cancel(self, request_id: str) -> TokenChunk | None:
        """Drops a request wherever it is; returns its last chunk, or None if it is not here."""
        for state in list(self.waiting):
            if state.request.request_id == request_id:
                self.waiting.remove(state)
                return self._last_chunk(state, (), "", "abort")
        for state in self.running:
            if state.request.request_id == request_id:
                return self._retire(state, (), "", "abort")
        return None

    def swap_between_cycles(self, apply: Callable[[], bool]) -> None:
        """Runs ``apply`` before the next cycle. It returns True if the drafter's cached rows stay valid."""
        self._pending_swap = apply

    @torch.inference_mode()
    def step(self) -> list[TokenChunk]:
        """One cycle of everything that runs."""
        self._apply_swap()
        self._admit()
        for state in [s for s in self.running if not s.prefill_done]:
            self._prefill(state)
        ready = [s for s in self.running if s.prefill_done]
        return self._cycle(ready) if ready else []

    def _cycle(self, states: list[RequestState]) -> list[TokenChunk]:
        begin = self._clock()
        slots = [s.slot for s in states]
        sampling = SamplingBatch.of([s.request.sampling for s in states], self.target.device)
        drafted = self._draft(states, slots, sampling)
        drafted_s = self._clock()
        result = verify(
            self.target,
            self._cache,
            slots,
            drafted.tree,
            drafted.max_depth,
            states=[s.choice for s in states],
            sampling=sampling,
            noise=self._noise,
            top_k=self.settings.top_k,
        )
        verified_s = self._clock()
        before = [len(s.tokens) for s in states]
        chunks, finished = self._commit(states, slots, drafted, result)
        ended_s = self._clock()
        seconds = (drafted_s - begin, verified_s - drafted_s, ended_s - verified_s)
        for state, speculated in zip(states, drafted.speculate, strict=True):
            for counts in (state.segment, state.total) if speculated else (state.total,):
                counts.spend(*(s / len(states) for s in seconds))
        if self.planner is not None and self.speculation:
            committed = [len(s.tokens) - count for s, count in zip(states, before, strict=True)]
            any_drafted = any(drafted.speculate)
            self.planner.record(
                CycleResult(
                    *seconds,
                    committed_tokens=committed,
                    tree=drafted.tree if any_drafted else None,
                    accepted_rows=result.rows if any_drafted else None,
                    num_accepted=result.num_accepted if any_drafted else (),
                )
            )
        chunks.extend(self._retire(*end) for end in finished)
        self._report(states)
        return chunks

    def _draft(self, states: list[RequestState], slots: list[int], sampling: SamplingBatch) -> _Drafted:
        roots = torch.tensor([s.tokens[-1] for s in states], device=self.target.device)
        speculate = self._speculating(states)
        rows = [i for i, yes in enumerate(speculate) if yes]
        if self.drafter is None or not rows:
            return _Drafted(root_only(roots), 0, NO_SPECULATION, speculate, None)
        drafting = [states[i] for i in rows]
        for state in drafting:
            self._catch_up(state)
        index = torch.tensor(rows, device=self.target.device)
        draft = self.drafter.draft(
            self._draft_cache,
            [slots[i] for i in rows],
            self._new_positions(drafting, keep=0),
            roots[index],
            sampling if len(rows) == len(states) else sampling.rows(index),
            self._shared_noise(drafting),
            self.planner,
        )
        tree = draft.tree if len(rows) == len(states) else place_rows(draft.tree, index, roots)
        return _Drafted(tree, draft.max_depth, draft.plan, speculate, draft.offers)

    def _speculating(self, states: list[RequestState]) -> tuple[bool, ...]:
        if self.drafter is None or not self.speculation:
            return (False,) * len(states)
        if self.planner is None:
            return (True,) * len(states)
        return self.planner.begin(
            [Participant(s.request.request_id, s.request.domain) for s in states],
            [self._num_pending(s) for s in states],
        )

    def _shared_noise(self, states: list[RequestState]) -> NoiseWindow | None:
        """The noise that the drafter ranks by, moved on to this cycle's positions."""
        sampled = [s for s in states if s.request.sampling.temperature > 0]
        if self.drafter is None or not self.drafter.shares_noise or not sampled:
            return None
        self._noise.advance(
            [s.slot for s in sampled],
            [len(s.tokens) for s in sampled],
            [s.request.sampling.seed for s in sampled],
            [s.request.sampling.choice for s in sampled],
        )
        return self._noise

    def _catch_up(self, state: RequestState) -> None:
        """Absorbs what was left pending while the request did not speculate, in chunks; one position stays pending.

        What a single cycle can leave is drafted from at once. More would make every request of the batch as wide.
        """
        assert self.drafter is not None
        pending = self._num_pending(state)
        if pending <= self.drafter.max_depth + 1:
            return
        while pending > 1:
            taken = min(_CATCH_UP_POSITIONS, pending - 1)
            self.drafter.refresh(self._draft_cache, [state.slot], self._new_positions([state], keep=pending - taken))
            pending -= taken

    def _num_pending(self, state: RequestState) -> int:
        """Positions that the drafter is behind; while speculation is off ``pending`` has an entry per cycle."""
        return len(state.tokens) - 1 - int(self._draft_cache.positions[state.slot])

    def _new_positions(self, states: list[RequestState], keep: int) -> NewPositions:
        """Takes pending features with the token after each; ``keep`` of the newest stay pending."""
        features = [torch.cat(s.pending) if s.pending else None for s in states]
        counts = [max(0, (0 if f is None else f.shape[0]) - keep) for f in features]
        width = max(1, *counts)
        size, dtype, device = self.target.feature_size, self.target.dtype, self.target.device
        padded = torch.zeros(len(states), width, size, dtype=dtype, device=device)
        following = torch.zeros(len(states), width, dtype=torch.int64)
        for row, (state, taken, count) in enumerate(zip(states, features, counts, strict=True)):
            at = self._draft_cache.positions[state.slot]
            following[row, :count] = torch.tensor(state.tokens[at + 1 : at + 1 + count], dtype=torch.int64)
            if taken is not None:
                padded[row, :count] = taken[:count]
                state.pending = [taken[count:]] if keep and count < taken.shape[0] else []
        return NewPositions(padded, following.to(self.target.device), counts)

    def _commit(
        self, states: list[RequestState], slots: list[int], drafted: _Drafted, result: VerifyResult
    ) -> tuple[list[TokenChunk], list[_Finished]]:
        chunks: list[TokenChunk] = []
        kept_counts: list[int] = []
        finished: list[_Finished] = []
        nodes, ranks = (drafted.tree.size - 1).tolist(), drafted.ranks(result)
        for row, (state, path) in enumerate(zip(states, result.paths, strict=True)):
            ending = truncate_at_end(
                path,
                tokens_left=state.tokens_left,
                eos_token_ids=self.target.eos_token_ids,
                stop_token_ids=frozenset(state.request.stop_token_ids),
                ignore_eos=state.request.ignore_eos,
            )
            kept, reason, text = ending.num_kept, ending.finish_reason, ""
            if state.text is not None:
                piece = state.text.push(path[: ending.num_shown])
                text = piece.text
                if piece.stopped:
                    kept, reason = piece.kept_tokens, "stop"
                elif reason is not None:
                    text += state.text.finish()
            tokens = tuple(path[:kept])
            state.tokens.extend(tokens)
            state.choice.append(tokens)
            # A copy: a view would keep the whole batch's features for as long as the longest request runs.
            state.keep_features(result.features[row, :kept].clone(), self.drafter is not None)
            state.keep_laws(result.top, row, kept)
            if kept == len(path):
                state.accepted.append(kept - 1)
            plan = drafted.plan if drafted.speculate[row] else NO_SPECULATION
            if self.drafter is not None:
                state.plans.append(tuple(plan.to_list()))
            # Events are about drafts: a cycle without any says nothing of acceptance.
            for counts in (state.total, state.segment) if plan.node_budget else (state.total,):
                accepted = max(0, min(len(path) - 1, kept - (kept == len(path))))
                counts.add(accepted, kept, nodes[row], plan.blocks, ranks[row] if kept == len(path) else -1)
            kept_counts.append(kept)
            if reason is None:
                chunks.append(TokenChunk(request_id=state.request.request_id, tokens=tokens, text=text))
            else:
                finished.append((state, tokens, text, reason))
        self._cache.commit(slots, result.rows, kept_counts)
        return chunks, finished

    def _report(self, states: list[RequestState]) -> None:
        for state in states:
            if state in self.running and state.segment.cycles >= self.settings.segment_cycles:
                self._end_segment(state, last=False)

    def _end_segment(self, state: RequestState, last: bool) -> None:
        self._listener.segment(state, last)
        state.segment = CycleCounts()
        state.segment_versions = [self.drafter_version]

    def _admit(self) -> None:
        now = self._clock()
        while self.waiting and self._cache.num_free_slots:
            state = self.waiting.popleft()
            state.slot, state.started_s = self._cache.allocate(), now
            state.versions = [self.drafter_version]
            state.segment_versions = [self.drafter_version]
            state.speculative = self.drafter is not None and self.speculation
            self._noise.reset(state.slot)
            if self._draft_cache is not None:
                self._draft_cache.reset(state.slot)
            self.running.append(state)
            if state.prefill_done:
                state.decoding_since_s = now

    def _prefill(self, state: RequestState) -> None:
        """One chunk of the prompt; the drafter follows, one position behind (its pairs need the next token)."""
        prompt = state.request.prompt_tokens
        end = min(state.prefilled + self.settings.prefill_chunk_tokens, len(prompt) - 1)
        chunk = torch.tensor([prompt[state.prefilled : end]], device=self.target.device)
        none = torch.zeros(1, 0, dtype=torch.int64, device=self.target.device)
        output = self.target.forward(self._cache, [state.slot], chunk, logits_rows=none)
        self._cache.advance([state.slot], [chunk.shape[1]])
        state.prefilled = end
        state.keep_features(output.features[0], self.drafter is not None)
        if self.drafter is not None and (self.planner is None or self.planner.speculates(state.request.domain)):
            new = self._new_positions([state], keep=1)
            if new.counts[0]:
                self.drafter.refresh(self._draft_cache, [state.slot], new)
        if state.prefill_done:
            state.decoding_since_s = self._clock()

    def _retire(self, state: RequestState, tokens: Sequence[int], text: str, reason: str) -> TokenChunk:
        self.running.remove(state)
        self._cache.release(state.slot)  # first: whatever a listener does, the slot is free
        self._end_segment(state, last=True)
        self._listener.finished(state, reason)
        return self._last_chunk(state, tuple(tokens), text, reason)

    def _last_chunk(self, state: RequestState, tokens: tuple[int, ...], text: str, reason: str) -> TokenChunk:
        return TokenChunk(
            request_id=state.request.request_id,
            tokens=tokens,
            text=text,
            finish_reason=reason,
            stats=state.stats(self._clock()),
        )

    def _apply_swap(self) -> None:
        if self._pending_swap is None:
            return
        apply, self._pending_swap = self._pending_swap, None
        before = self.drafter_version
        rows_stay_valid = apply()
        if rows_stay_valid and self.drafter_version == before:
            return  # the weights were refused; what serves is what served
        if self.planner is not None:
            self.planner.drafter_changed()
        for state in self.running:
            state.versions.append(self.drafter_version)
            state.segment_versions.append(self.drafter_version)
            state.flagged |= not rows_stay_valid

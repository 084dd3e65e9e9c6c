"""The decode loop: admit, prefill, then draft -> verify -> commit -> feedback for all running requests at once.

A plain class without Ray, Redis or threads: ``step`` is one cycle. Nothing in it waits for learning or disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams
from specblock.cuda_ext.transfer import on_device
from specblock.daemon.drafting import Drafted, Drafting
from specblock.daemon.messages import GenerationRequest, TokenChunk
from specblock.daemon.request import CycleCounts, Kept, RequestState, check_request
from specblock.daemon.tree_planner import TreePlanner
from specblock.drafter.interface import AnyDrafter
from specblock.verifier.model import TargetModel
from specblock.verifier.result import VerifyResult
from specblock.verifier.text import TextStream
from specblock.verifier.verify import verify

Clock = Callable[[], float]


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
        self._clock, self._listener = clock, listener or Listener()
        self._drafting = Drafting(drafter, target, planner, settings.slots, settings.capacity_tokens)
        self._cache = target.new_cache(settings.slots, settings.capacity_tokens + self._drafting.tree_rows)
        self.waiting: deque[RequestState] = deque()
        self.running: list[RequestState] = []
        self._pending_swap: Callable[[], bool] | None = None
        self._sampled: list[SamplingParams] = []
        self._as_tensors = SamplingBatch.of([], target.device)

    @property
    def speculation(self) -> bool:
        """Whether requests draft at all; False is plain decoding with the drafter kept ready."""
        return self._drafting.enabled

    @speculation.setter
    def speculation(self, on: bool) -> None:
        self._drafting.enabled = on

    @property
    def idle(self) -> bool:
        """True when there is nothing to decode."""
        return not self.waiting and not self.running

    def submit(self, request: GenerationRequest) -> None:
        """Queues a request; prompt and completion must fit a slot.

        Raises:
            ValueError: see ``check_request``.
        """
        check_request(request, self.target.vocab_size, self.settings.capacity_tokens)
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

    def use_graphs(self, ahead: bool = True) -> None:
        """Runs cycles as CUDA graphs where there are any: an engine that serves for long gets recording's time back.

        Args:
            ahead: record the target's forwards of every size now, instead of when each is first needed.
        """
        self._drafting.use_graphs()
        self.target.use_graphs(self._cache)
        if ahead:
            self.target.record_graphs(self._cache, self._drafting.tree_rows)

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
        """Draft (which first refreshes the drafter), verify and accept, commit, feedback, emit."""
        begin_s = self._clock()
        sampling = self._sampling([s.request.sampling for s in states])
        drafted = self._drafting.draft(states, sampling)
        drafted_s = self._clock()
        result = verify(
            self.target,
            self._cache,
            [s.slot for s in states],
            drafted.tree,
            drafted.max_depth,
            states=[s.choice for s in states],
            sampling=sampling,
            noise=self._drafting.noise,
            top_k=self.settings.top_k,
        )
        verified_s = self._clock()
        kept = self._commit(states, drafted, result)
        committed_s = self._clock()
        seconds = (drafted_s - begin_s, verified_s - drafted_s, committed_s - verified_s)
        for row, state in enumerate(states):
            for counts in _counted(state, drafted.speculate[row]):
                counts.spend(*(s / len(states) for s in seconds))
        self._drafting.learn(drafted, result, seconds, [len(k.tokens) for k in kept])
        return self._emit(states, kept)

    def _sampling(self, params: list[SamplingParams]) -> SamplingBatch:
        """As tensors; from one cycle to the next they are mostly the same."""
        if params != self._sampled:
            self._sampled, self._as_tensors = params, SamplingBatch.of(params, self.target.device)
        return self._as_tensors

    def _commit(self, states: list[RequestState], drafted: Drafted, result: VerifyResult) -> list[Kept]:
        """Takes what belongs to each completion out of its accepted path, with all that is remembered about it."""
        everything: list[Kept] = []
        nodes, ranks = drafted.nodes_and_ranks(result)
        for row, (state, path) in enumerate(zip(states, result.paths, strict=True)):
            kept = state.take(path, self.target.eos_token_ids)
            count, whole = len(kept.tokens), len(kept.tokens) == len(path)
            # A copy: a view would keep the whole batch's features for as long as the longest request runs.
            state.keep_features(result.features[row, :count].clone(), self.drafter is not None)
            state.keep_laws(result.top, row, count)
            if whole:
                state.accepted.append(count - 1)
            plan = drafted.plan_of(row)
            if self.drafter is not None:
                state.plans.append(tuple(plan.to_list()))
            accepted = max(0, min(len(path) - 1, count - whole))
            for counts in _counted(state, plan.node_budget > 0):
                counts.add(accepted, count, nodes[row], plan.blocks, ranks[row] if whole else -1)
            everything.append(kept)
        self._cache.commit([s.slot for s in states], result.rows, [len(k.tokens) for k in everything])
        return everything

    def _emit(self, states: list[RequestState], kept: list[Kept]) -> list[TokenChunk]:
        """Chunks of the requests that go on, then those of the ones that ended; segments that are full go out."""
        chunks = [
            TokenChunk(request_id=state.request.request_id, tokens=k.tokens, text=k.text)
            for state, k in zip(states, kept, strict=True)
            if k.finish_reason is None
        ]
        for state, k in zip(states, kept, strict=True):
            if k.finish_reason is not None:
                chunks.append(self._retire(state, k.tokens, k.text, k.finish_reason))
        for state in states:
            if state in self.running and state.segment.cycles >= self.settings.segment_cycles:
                self._end_segment(state, last=False)
        return chunks

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
            state.speculative = self._drafting.active
            self._drafting.reset(state.slot, state.request.domain)
            self.running.append(state)
            if state.prefill_done:
                state.decoding_since_s = now

    def _prefill(self, state: RequestState) -> None:
        """One chunk of the prompt; the drafter follows."""
        prompt = state.request.prompt_tokens
        end = min(state.prefilled + self.settings.prefill_chunk_tokens, len(prompt) - 1)
        chunk = on_device([prompt[state.prefilled : end]], self.target.device)
        none = torch.zeros(1, 0, dtype=torch.int64, device=self.target.device)
        output = self.target.forward(self._cache, [state.slot], chunk, logits_rows=none)
        self._cache.advance([state.slot], [chunk.shape[1]])
        state.prefilled = end
        state.keep_features(output.features[0], self.drafter is not None)
        self._drafting.follow(state, len(self.running))
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
        self._drafting.drafter_changed()
        for state in self.running:
            state.versions.append(self.drafter_version)
            state.segment_versions.append(self.drafter_version)
            state.flagged |= not rows_stay_valid


def _counted(state: RequestState, drafted: bool) -> tuple[CycleCounts, ...]:
    """Where a cycle counts. Events are about drafts: a cycle without any says nothing of acceptance."""
    return (state.total, state.segment) if drafted else (state.total,)

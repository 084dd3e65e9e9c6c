"""The drafting half of a cycle: who drafts, what the drafter still has to absorb, the noise it shares with the target.

The drafter follows each request one position behind the target, because it reads pairs (feature, the token after it).
Features that it has not absorbed wait in ``RequestState.pending``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specblock.cuda_ext.noise import NoiseWindow
from specblock.cuda_ext.ops import rank_of_choice
from specblock.cuda_ext.sampling import SamplingBatch
from specblock.cuda_ext.transfer import on_device
from specblock.cuda_ext.tree import DraftTree, Offers, place_rows, root_only
from specblock.daemon.planner_types import CycleResult
from specblock.daemon.request import RequestState
from specblock.daemon.speculation import Participant
from specblock.daemon.tree_planner import TreePlanner
from specblock.drafter.interface import AnyDrafter, NewPositions
from specblock.drafter.plan import NO_SPECULATION, DraftPlan
from specblock.verifier.model import TargetModel
from specblock.verifier.result import VerifyResult

_CATCH_UP_POSITIONS = 256  # drafter positions per forward when a request speculates again after a pause


@dataclass(frozen=True, slots=True)
class Drafted:
    """A cycle's trees for the whole batch.

    Attributes:
        tree: one per request; those that did not draft have their root alone.
        max_depth: upper bound of the trees' depth.
        plan: sizes the trees were grown with.
        speculate: which requests drafted.
        offers: what was proposed to those that drafted, in order; None if there are none.
    """

    tree: DraftTree
    max_depth: int
    plan: DraftPlan
    speculate: tuple[bool, ...]
    offers: Offers | None

    def plan_of(self, row: int) -> DraftPlan:
        """The plan of the request in ``row`` of the batch."""
        return self.plan if self.speculate[row] else NO_SPECULATION

    def nodes_and_ranks(self, result: VerifyResult) -> tuple[list[int], list[int]]:
        """Per request of the batch, drafted nodes and ``rank_of_choice`` where acceptance stopped.

        Without drafts these are 0 and -1, known without asking the device.
        """
        nodes, ranks = [0] * len(self.speculate), [-1] * len(self.speculate)
        if self.offers is None:
            return nodes, ranks
        members = [row for row, yes in enumerate(self.speculate) if yes]
        last = [result.num_accepted[row] for row in members]
        member_D, last_D = on_device([members, last], self.tree.token.device)
        rank_D = rank_of_choice(self.offers, result.rows[member_D, last_D], result.tokens[member_D, last_D])
        found = torch.stack([self.tree.size[member_D] - 1, rank_D]).tolist()
        for row, count, rank in zip(members, *found, strict=True):
            nodes[row], ranks[row] = count, rank
        return nodes, ranks


class Drafting:
    """A drafter with its cache, for the slots of one decode loop. Without a drafter every tree is a root."""

    def __init__(
        self,
        drafter: AnyDrafter | None,
        target: TargetModel,
        planner: TreePlanner | None,
        slots: int,
        capacity_tokens: int,
    ) -> None:
        """Args:
        drafter: drafts; None is plain decoding.
        target: whose features and noise it reads.
        planner: chooses tree sizes per cycle; None takes the drafter's fixed ones.
        slots: requests decoded together.
        capacity_tokens: tokens per slot, prompt and completion.
        """
        self.enabled = drafter is not None
        self._drafter, self._target, self._planner = drafter, target, planner
        self._cache: Any = drafter.new_cache(slots, capacity_tokens) if drafter else None
        depth = drafter.max_depth if drafter else 0
        self.noise = NoiseWindow(slots, depth + 1, target.vocab_size, target.device)

    @property
    def active(self) -> bool:
        """Whether requests that start now may draft."""
        return self._drafter is not None and self.enabled

    @property
    def tree_rows(self) -> int:
        """Most rows of a tree, root included."""
        return self._drafter.settings.node_budget + 1 if self._drafter else 1

    def use_graphs(self) -> None:
        """See ``Engine.use_graphs``."""
        if self._drafter is not None:
            self._drafter.use_graphs(self._cache)

    def reset(self, slot: int, domain: str) -> None:
        """Forgets a slot, for its next request, of text of ``domain``."""
        self.noise.reset(slot)
        if self._cache is not None:
            self._cache.reset(slot, domain)

    def drafter_changed(self) -> None:
        """Other weights serve from here on: what was learnt about sizes is out of date."""
        if self._planner is not None:
            self._planner.drafter_changed()

    def follow(self, state: RequestState, batch: int) -> None:
        """Absorbs a chunk of the prompt, all but its newest position, unless text of this kind is not drafted for.

        Args:
            state: the request.
            batch: requests that wait for it, itself included.
        """
        planner, domain = self._planner, state.request.domain
        if self._drafter is None or not (planner is None or planner.speculates(domain)):
            return
        begin_s = 0.0 if planner is None else planner.clock()
        new = self._new_positions([state], keep=1)
        if new.counts[0]:
            self._drafter.refresh(self._cache, [state.slot], new)
        if planner is not None:
            planner.absorbed(domain, planner.clock() - begin_s, batch)

    def draft(self, states: Sequence[RequestState], sampling: SamplingBatch) -> Drafted:
        """Trees for all requests of a cycle; absorbs what the last verification left."""
        roots = on_device([s.tokens[-1] for s in states], self._target.device)
        speculate = self._speculating(states)
        rows = [i for i, yes in enumerate(speculate) if yes]
        if self._drafter is None or not rows:
            return Drafted(root_only(roots), 0, NO_SPECULATION, speculate, None)
        drafting = [states[i] for i in rows]
        for state in drafting:
            self._catch_up(state)
        index = None if len(rows) == len(states) else on_device(rows, self._target.device)
        draft = self._drafter.draft(
            self._cache,
            [s.slot for s in drafting],
            self._new_positions(drafting, keep=0),
            roots if index is None else roots[index],
            sampling if index is None else sampling.rows(index),
            self._shared_noise(drafting),
            self._planner,
        )
        tree = draft.tree if index is None else place_rows(draft.tree, index, roots)
        return Drafted(tree, draft.max_depth, draft.plan, speculate, draft.offers)

    def learn(
        self, drafted: Drafted, result: VerifyResult, seconds: tuple[float, float, float], kept: Sequence[int]
    ) -> None:
        """Tells the planner what a cycle cost and brought.

        Args:
            drafted: the cycle's trees.
            result: what the target made of them.
            seconds: drafting, verification, everything else.
            kept: tokens committed per request.
        """
        if self._planner is None or not self.enabled:
            return
        any_drafted = any(drafted.speculate)
        self._planner.record(
            CycleResult(
                *seconds,
                committed_tokens=kept,
                tree=drafted.tree if any_drafted else None,
                accepted_rows=result.rows if any_drafted else None,
                num_accepted=result.num_accepted if any_drafted else (),
                offers=drafted.offers if any_drafted else None,
            )
        )

    def num_pending(self, state: RequestState) -> int:
        """Positions that the drafter is behind; while speculation is off ``pending`` has an entry per cycle."""
        return len(state.tokens) - 1 - int(self._cache.positions[state.slot])

    def _speculating(self, states: Sequence[RequestState]) -> tuple[bool, ...]:
        if not self.active:
            return (False,) * len(states)
        if self._planner is None:
            return (True,) * len(states)
        return self._planner.begin(
            [Participant(s.request.request_id, s.request.domain) for s in states],
            [self.num_pending(s) for s in states],
        )

    def _shared_noise(self, states: Sequence[RequestState]) -> NoiseWindow | None:
        """The noise that the drafter ranks by, moved on to this cycle's positions."""
        sampled = [s for s in states if s.request.sampling.temperature > 0]
        if self._drafter is None or not self._drafter.shares_noise or not sampled:
            return None
        self.noise.advance(
            [s.slot for s in sampled],
            [len(s.tokens) for s in sampled],
            [s.request.sampling.seed for s in sampled],
            [s.request.sampling.choice for s in sampled],
        )
        return self.noise

    def _catch_up(self, state: RequestState) -> None:
        """Absorbs what was left pending while the request did not speculate, in chunks; one position stays pending.

        What a single cycle can leave is drafted from at once. More would make every request of the batch as wide.
        """
        assert self._drafter is not None
        pending = self.num_pending(state)
        if pending <= self._drafter.max_depth + 1:
            return
        while pending > 1:
            taken = min(_CATCH_UP_POSITIONS, pending - 1)
            self._drafter.refresh(self._cache, [state.slot], self._new_positions([state], keep=pending - taken))
            pending -= taken

    def _new_positions(self, states: Sequence[RequestState], keep: int) -> NewPositions:
        """Takes pending features with the token after each; ``keep`` of the newest stay pending."""
        features = [torch.cat(s.pending) if s.pending else None for s in states]
        counts = [max(0, (0 if f is None else f.shape[0]) - keep) for f in features]
        width = max(1, *counts)
        size, dtype, device = self._target.feature_size, self._target.dtype, self._target.device
        alone = features[0] if len(states) == 1 and counts[0] else None  # nothing to fill up
        padded = (
            torch.zeros(len(states), width, size, dtype=dtype, device=device) if alone is None else alone[None, :width]
        )
        following: list[list[int]] = []
        for row, (state, taken, count) in enumerate(zip(states, features, counts, strict=True)):
            at = self._cache.positions[state.slot]
            following.append(state.tokens[at + 1 : at + 1 + count] + [0] * (width - count))
            if taken is not None:
                if alone is None:
                    padded[row, :count] = taken[:count]
                state.pending = [taken[count:]] if keep and count < taken.shape[0] else []
        return NewPositions(padded, on_device(following, device), counts)

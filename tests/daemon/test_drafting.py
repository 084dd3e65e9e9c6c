"""The drafting half alone: who drafts, and what stays pending for the drafter."""

from __future__ import annotations

import torch

from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams
from specblock.daemon.drafting import Drafting
from specblock.daemon.messages import GenerationRequest
from specblock.daemon.request import RequestState
from specblock.drafter.plan import NO_SPECULATION
from specblock.verifier.model import TargetModel
from tests.daemon.test_engine import Pauses, drafter_of, target_of

GREEDY = SamplingParams(temperature=0.0)


def state_of(target: TargetModel, slot: int, name: str, prompt: int) -> RequestState:
    """A request whose prompt but the last token has been prefilled, nothing of it absorbed yet."""
    request = GenerationRequest(
        request_id=name, prompt_tokens=tuple(range(2, 2 + prompt)), sampling=GREEDY, max_tokens=300
    )
    state = RequestState(request, None, target.vocab_size, 0.0, target.device)
    state.slot = slot
    push(target, state, prompt - 1)
    return state


def push(target: TargetModel, state: RequestState, count: int) -> None:
    state.keep_features(torch.randn(count, target.feature_size), True)


def batch(states: list[RequestState]) -> SamplingBatch:
    return SamplingBatch.of([s.request.sampling for s in states], torch.device("cpu"))


def test_without_a_drafter_every_tree_is_a_root() -> None:
    target = target_of("llama", torch.float32)
    drafting = Drafting(None, target, None, slots=1, capacity_tokens=32)
    state = state_of(target, 0, "a", 4)
    drafting.reset(0, "any")
    drafting.follow(state, 1)
    drafted = drafting.draft([state], batch([state]))
    assert not drafting.active and not drafting.enabled and drafting.tree_rows == 1
    assert drafted.tree.token.tolist() == [[5]] and drafted.max_depth == 0
    assert (drafted.speculate, drafted.offers, drafted.plan_of(0)) == ((False,), None, NO_SPECULATION)


def test_switched_off_it_follows_the_prompt_and_drafts_nothing() -> None:
    target = target_of("llama", torch.float32)
    drafting = Drafting(drafter_of(target), target, None, slots=1, capacity_tokens=64)
    drafting.enabled = False
    state = state_of(target, 0, "a", 6)
    drafting.follow(state, 1)
    assert not drafting.active and drafting.num_pending(state) == 1, "pairs need the token after: one stays"
    assert drafting.draft([state], batch([state])).tree.num_rows == 1
    assert drafting.num_pending(state) == sum(p.shape[0] for p in state.pending) == 1
    drafting.enabled = True
    assert drafting.draft([state], batch([state])).speculate == (True,)
    assert drafting.num_pending(state) == 0 and not state.pending


def test_a_pause_leaves_positions_pending_until_the_request_drafts_again() -> None:
    target = target_of("llama", torch.float32)
    drafter = drafter_of(target, blocks=2, leaf_cap=4)
    drafting = Drafting(drafter, target, Pauses(2), slots=2, capacity_tokens=400)  # type: ignore[arg-type]
    states = [state_of(target, 0, "always", 5), state_of(target, 1, "later", 3)]
    for state in states:
        drafting.follow(state, 1)
    widths = []
    refresh = drafter.paired

    def watched(cache, slots, new):  # type: ignore[no-untyped-def]
        widths.append(max(new.counts))
        return refresh(cache, slots, new)

    drafter.paired = watched  # type: ignore[method-assign]
    for cycle, pending in enumerate((1, 301, 0)):
        drafted = drafting.draft(states, batch(states))
        assert drafted.speculate == (True, cycle == 2)
        assert drafted.plan_of(0).node_budget == 12 and drafted.plan_of(1).node_budget == (12 if cycle == 2 else 0)
        assert [drafting.num_pending(s) for s in states] == [0, pending]
        tokens = 300 if cycle == 0 else 1
        for state, count in zip(states, (1, tokens), strict=True):
            state.tokens.extend([9] * count)
            push(target, state, count)
    assert max(widths) == 256 and widths[-1] == 1, "caught up in chunks, then drafted from a single position"

"""The rank histogram: where acceptance stopped, how far down its own list did the drafter have the target's token."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from specblock.bandit.events import AcceptanceEvent, decode, encode, rank_bucket
from specblock.cuda_ext.noise import NoiseWindow
from specblock.cuda_ext.ops import grow_tree
from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams
from specblock.cuda_ext.tree import Candidates
from specblock.daemon.engine import Engine, EngineSettings
from specblock.daemon.feedback import Feedback
from specblock.daemon.messages import GenerationRequest
from specblock.daemon.windows import WindowLimits, WindowStore
from specblock.drafter.config import DraftSettings
from specblock.drafter.interface import AnyDrafter, Draft, NewPositions
from specblock.drafter.lookup import LookupCache, LookupDrafter
from specblock.drafter.plan import DraftPlan, Limits
from tests.daemon.test_engine import VOCAB, Pauses, drafter_of, planner_of, random_requests, run, target_of

RANKS = (0, 1, 2, 3, 1, 4, 9, 10, 1, 15, None, 0, 5)
"""Rank of the target's token by position; None: it is not proposed."""
WIDTH, KEPT = 16, 2


class KnownRanks(LookupDrafter):
    """Proposes 16 tokens behind the root, the true one at a known rank, and verifies the first two.

    Behind the first of them it proposes the true token too, at rank 0, but the budget always prunes it.
    """

    def __init__(self, texts: list[list[int]]) -> None:
        super().__init__(DraftSettings(node_budget=KEPT, blocks=1), torch.device("cpu"), torch.float64)
        self.texts = texts

    def draft(
        self,
        cache: LookupCache,
        slots: list[int],
        new: NewPositions,
        root_token: torch.Tensor,
        sampling: SamplingBatch,
        noise: NoiseWindow | None,
        limits: Limits | None = None,
    ) -> Draft:
        self.refresh(cache, slots, new)
        tokens = []
        for slot in slots:
            at = cache.positions[slot]
            history = cache.tokens[slot, :at].tolist()
            text = next(t for t in self.texts if t[1 : at + 1] == history)
            true, following = [*text[at + 1 : at + 3], 0, 0][:2]
            offered = [token for token in range(VOCAB) if token != true][:WIDTH]
            rank = RANKS[at % len(RANKS)]
            if rank is not None:
                offered[rank] = true
            tokens.append([*offered, following])
        order = torch.arange(WIDTH + 1).expand(len(slots), -1)
        below = order == WIDTH
        candidates = Candidates(
            token=torch.tensor(tokens),
            parent=torch.where(below, 0, -1),
            score=-1.0 - order,
            depth=1 + below.long(),
            block=torch.zeros_like(order),
            slot=below.long(),
            rank=torch.where(below, 0, order),
            valid=torch.ones_like(below),
        )
        tree, offers = grow_tree(root_token, candidates, KEPT, 2)
        return Draft(tree, DraftPlan((), KEPT), 2, offers)


def expected_ranks(prompt_tokens: int, max_tokens: int) -> list[int]:
    """The histogram of one request that drafts in every cycle, by walking its positions."""
    buckets = [0, 0, 0, 0]
    at, end = prompt_tokens - 1, prompt_tokens - 1 + max_tokens
    while at < end:
        rank = RANKS[at % len(RANKS)]
        accepted = rank is not None and rank < KEPT
        at += 1 + accepted
        if at > end:
            break  # the text ended before the token at which acceptance stopped
        if rank is None or rank >= 10:
            buckets[3] += 1
        elif rank == 0:  # accepted; behind it the true token is rank 0 and was pruned
            buckets[0] += 1
        elif not accepted:
            buckets[1 if rank <= 3 else 2] += 1
    return buckets


def requests_of(*prompts: int) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id="always" if i == 0 else f"r{i}-0",
            prompt_tokens=tuple(range(2 + i, 2 + i + prompt)),
            sampling=SamplingParams(temperature=1.0, seed=i),
            max_tokens=60 - i,
            ignore_eos=True,
        )
        for i, prompt in enumerate(prompts)
    ]


def test_known_ranks_land_in_their_buckets() -> None:
    target = target_of("llama", torch.float64)
    requests = requests_of(2, 5, 9)
    plain, _ = run(target, None, requests, slots=1)
    drafter = KnownRanks([[*r.prompt_tokens, *plain[r.request_id]] for r in requests])
    for slots in (1, 3):
        drafted, keep = run(target, drafter, requests, slots, segment_cycles=1000)
        assert drafted == plain
        for request in requests:
            total = keep.states[request.request_id].total
            assert total.ranks == expected_ranks(len(request.prompt_tokens), request.max_tokens)
            assert min(total.ranks) > 0 and sum(total.ranks) < total.cycles


def test_only_requests_that_drafted_are_counted() -> None:
    """One request drafts always and lies beside others that pause: the ranks of a part of the batch."""
    target = target_of("llama", torch.float64)
    requests = requests_of(2, 5, 9)
    plain, _ = run(target, None, requests, slots=1)
    drafter = KnownRanks([[*r.prompt_tokens, *plain[r.request_id]] for r in requests])
    for order in (requests, requests[::-1]):
        drafted, keep = run(target, drafter, order, 3, Pauses(1000))  # type: ignore[arg-type]
        assert drafted == plain
        for name, state in keep.states.items():
            drafts = name == "always"
            assert state.total.ranks == (expected_ranks(2, 60) if drafts else [0, 0, 0, 0])


@pytest.mark.parametrize("kind", ["specblock", "eagle3", "parallel", "lookup"])
def test_buckets_never_outnumber_cycles(kind: str) -> None:
    target = target_of("llama", torch.float64)
    requests = random_requests(24, seed=8)
    drafter: AnyDrafter = LookupDrafter(DraftSettings(node_budget=4), target.device, target.dtype)
    if kind != "lookup":
        drafter = drafter_of(target, kind, blocks=3, leaf_cap=4, node_budget=6)
    for planner in (None, planner_of(drafter, off_below=1.0, on_above=1.0)):
        _, keep = run(target, drafter, requests, 5, planner)
        totals = [state.total for state in keep.states.values()]
        assert all(sum(t.ranks) <= t.drafting_cycles <= t.cycles for t in totals)
        assert sum(sum(t.ranks) for t in totals) > 0


class Sink:
    def __init__(self) -> None:
        self.events: list[AcceptanceEvent] = []

    def offer(self, event: AcceptanceEvent) -> None:
        self.events.append(event)


def test_events_carry_the_ranks_of_their_segment() -> None:
    target = target_of("llama", torch.float64)
    (request,) = requests_of(5)
    plain, _ = run(target, None, [request], slots=1)
    drafter = KnownRanks([[*request.prompt_tokens, *plain["always"]]])
    sink = Sink()
    windows = WindowStore(WindowLimits(budget_bytes=1 << 20), lambda: 0.0)
    feedback = Feedback(sink, windows, "engine-0", lambda: 0.0, lambda: 1)
    settings = EngineSettings(slots=1, capacity_tokens=160, segment_cycles=7)
    engine = Engine(target, drafter, settings, lambda c=itertools.count(): float(next(c)), feedback, "v0")
    engine.submit(request)
    while not engine.idle:
        engine.step()
    events = [decode(encode(replace(event, incarnation="a", sequence=i))) for i, event in enumerate(sink.events)]
    histograms = [event.rank_histogram for event in events]
    assert len(histograms) > 3
    assert [sum(bucket) for bucket in zip(*histograms, strict=True)] == expected_ranks(5, 60)
    assert all(sum(event.rank_histogram) <= event.cycles for event in events)


def test_buckets_are_those_of_the_schema() -> None:
    assert [rank_bucket(rank) for rank in (0, 1, 3, 4, 9, 10, 1 << 30)] == [0, 1, 1, 2, 2, 3, 3]

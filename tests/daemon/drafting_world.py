"""A drafter, a target and a machine with known laws, for the planner's tests: real trees, invented chances and seconds.

At depth d of cycle i the target draws rank r with chance c(1-c)^r, c its confidence there. The drafter knows that law,
except that each of its slots is wrong with a chance that grows along a block. All draws are made in advance, so that
two policies meet the same cycles.

Legend: N cycles, B of them at a time, D depth, K slots, W fan-out, n leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specblock.cuda_ext.ops import find_child, grow_tree
from specblock.cuda_ext.tree import Candidates, DraftTree, Offers
from specblock.daemon.cost_curve import CostCurve, RowCurve
from specblock.daemon.planner_types import CycleResult
from specblock.daemon.speculation import Participant
from specblock.daemon.tree_planner import TreePlanner
from specblock.drafter.config import DraftSettings
from specblock.drafter.expand import choose_leaves, concatenate, expand_chain, extendable, root_leaf
from specblock.drafter.plan import DraftPlan, Limits, PlannedLimits
from specblock.drafter.proposals import Proposals

SLOTS, WIDTH, BLOCKS, LEAF_CAP, BUDGET = 4, 5, 2, 16, 48
DEPTH = SLOTS * BLOCKS
_WRONG = 1000  # token ids from here on are never the target's choice
SETTINGS = DraftSettings(blocks=BLOCKS, leaf_cap=LEAF_CAP, node_budget=BUDGET)


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


def curve(verify_per_row_s: float = 2e-4, block_s: float = 2e-3, flat_rows: int = 16) -> CostCurve:
    """Flat up to ``flat_rows`` rows at 10 ms, then linear."""
    verify = RowCurve(
        (1, flat_rows, flat_rows + 100), (0.01, 0.01 + 1e-4, 0.01 + 1e-4 + 100 * verify_per_row_s), per_request_s=1e-4
    )
    return CostCurve(
        verify=verify,
        first_block=RowCurve((1, 101), (block_s, block_s * 2)),
        later_block=RowCurve((1, 101), (block_s, block_s * 6)),
        overhead_s=5e-4,
    )


@dataclass
class World:
    """Draws of ``cycles`` cycles. ``quality`` is the chance that a slot knows the law given that the one before did."""

    cycles: int
    seed: int = 0
    quality: float = 0.93
    boast: float = 1.0
    """Factor on the drafter's log-probabilities: below 1 it claims more than it knows."""
    truth: Tensor = field(init=False)
    confidence: Tensor = field(init=False)
    knows: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        level = torch.rand(self.cycles, 1, generator=generator)
        noise = torch.rand(self.cycles, DEPTH, generator=generator)
        self.confidence = (0.25 + 0.5 * level + 0.2 * noise).clamp(max=0.95)
        uniform = torch.rand(self.cycles, DEPTH, generator=generator)
        self.truth = (torch.log1p(-uniform) / torch.log1p(-self.confidence)).floor().to(torch.int64)
        chance = self.quality ** torch.arange(1, SLOTS + 1)
        self.knows = torch.rand(BLOCKS, self.cycles, LEAF_CAP, SLOTS, generator=generator) < chance

    def draft(self, rows: Tensor, limits: Limits) -> tuple[DraftTree, Offers]:
        """Trees of cycles ``rows`` [B], and what was proposed for them."""
        batch = rows.shape[0]
        hidden = torch.zeros(batch, 1, SLOTS, 1)
        leaves = root_leaf(hidden, torch.ones(batch, dtype=torch.bool), 1)
        parts: list[Candidates] = []
        for block in range(BLOCKS):
            if block:
                if not limits.more(block - 1):
                    break
                score = extendable(parts[-1], hidden.shape[1], SLOTS)
                count = limits.leaves(block - 1, score)
                if not count:
                    break
                leaves = choose_leaves(parts[-1], hidden, leaves, score, 0, 0, count)
                hidden = torch.zeros(batch, count, SLOTS, 1)
            parts.append(expand_chain(self._propose(rows, leaves.depth, block), leaves, block * SLOTS * WIDTH, block))
        candidates = concatenate(parts)
        budget = limits.nodes(candidates.score.masked_fill(~candidates.valid, -torch.inf))
        return grow_tree(torch.zeros(batch, dtype=torch.int64), candidates, budget, DEPTH)

    def _propose(self, rows: Tensor, depth_Bn: Tensor, block: int) -> Proposals:
        depth_BnK = (depth_Bn[:, :, None] + torch.arange(SLOTS)).clamp(max=DEPTH - 1)
        confidence = self.confidence[rows[:, None, None], depth_BnK][..., None]
        knows = self.knows[block, rows, : depth_Bn.shape[1]][..., None]
        rank = torch.arange(WIDTH)
        claimed = torch.log(torch.tensor(max(self.quality, 0.9))) * torch.arange(1, SLOTS + 1)[:, None]
        log_prob = self.boast * (confidence.log() + rank * torch.log1p(-confidence) + claimed)
        token = torch.where(knows, rank, rank + _WRONG)
        fan_out = torch.where(confidence[..., 0] > 0.85, 2, WIDTH)
        return Proposals(token, log_prob, fan_out)

    def accept(self, tree: DraftTree, rows: Tensor) -> tuple[Tensor, list[int]]:
        """Rows of the accepted paths, padded as ``Acceptance`` does, and their lengths."""
        at = torch.zeros_like(tree.size)
        alive = torch.ones_like(tree.size, dtype=torch.bool)
        path = torch.arange(DEPTH + 1).repeat(rows.shape[0], 1)
        path[:, 0] = 0
        count = torch.zeros_like(tree.size)
        for d in range(DEPTH):
            child = find_child(tree, at, self.truth[rows, d])
            alive &= child >= 0
            at = torch.where(alive, child, at)
            path[:, d + 1] = torch.where(alive, child, d + 1)
            count += alive
        longest = int(count.max())
        return path[:, : longest + 1], count.tolist()

    def fixed_rates(self, costs: CostCurve, batch: int) -> dict[DraftPlan, float]:
        """Tokens per second of every fixed plan, all cycles at once.

        A tree of n nodes is the n best of the largest tree, so one tree per number of leaves serves all budgets.
        """
        every = torch.arange(self.cycles)
        rates: dict[DraftPlan, float] = {}
        for leaf_caps in ((), (4,), (8,), (12,), (LEAF_CAP,)):
            tree, _ = self.draft(every, PlannedLimits(DraftPlan(leaf_caps, BUDGET)))
            path, num_accepted = self.accept(tree, every)
            key = tree.score - 1e-6 * tree.depth - 1e-9 * torch.arange(tree.num_rows)
            place = torch.argsort(torch.argsort(key, dim=1, descending=True), dim=1).gather(1, path)
            real = torch.arange(path.shape[1]) <= torch.tensor(num_accepted)[:, None]
            drafting_s = costs.draft_s(0, 1, batch) + sum(costs.draft_s(1, n, batch) for n in leaf_caps)
            for nodes in range(1, BUDGET + 1):
                tokens = (real & (place <= nodes)).sum(dim=1).double().mean().item()  # the root is place 0
                seconds = drafting_s + costs.verify_s(nodes + 1, batch) + costs.overhead_s
                rates[DraftPlan(leaf_caps, nodes)] = batch * tokens / seconds
        return rates


@dataclass
class Ledger:
    """Sums over a run's cycles."""

    tokens: int = 0
    seconds: float = 0.0
    drafted: int = 0
    cycles: int = 0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class _TimedLimits:
    """Passes on to the planner after advancing the clock by the block that ran."""

    def __init__(self, planner: TreePlanner, clock: Clock, costs: CostCurve, drafting: int) -> None:
        self._planner, self._clock, self._costs, self._drafting = planner, clock, costs, drafting
        self._next_s = costs.draft_s(0, 1, drafting)

    def more(self, block: int) -> bool:
        return self._planner.more(block)

    def leaves(self, block: int, score_Bm: Tensor) -> int:
        self._clock.now_s += self._next_s
        count = self._planner.leaves(block, score_Bm)
        self._next_s = self._costs.draft_s(block + 1, count, self._drafting) if count else 0.0
        return count

    def nodes(self, score_BM: Tensor) -> int:
        self._clock.now_s += self._next_s
        return self._planner.nodes(score_BM)


def run(
    planner: TreePlanner,
    clock: Clock,
    world: World,
    costs: CostCurve,
    batch: int = 1,
    cycles: Sequence[int] | None = None,
    domain: str = "any",
) -> Ledger:
    """Decodes the world's cycles, ``batch`` at a time, on a machine that takes exactly ``costs``."""
    ledger = Ledger()
    rows = list(cycles if cycles is not None else range(world.cycles))
    participants = [Participant(f"r{b}", domain) for b in range(batch)]
    for start in range(0, len(rows) - batch + 1, batch):
        begin_s = clock.now_s
        speculate = planner.begin(participants)
        members = [b for b in range(batch) if speculate[b]]
        committed = [1] * batch
        tree = offers = path = None
        num_accepted: list[int] = []
        if members:
            these = torch.tensor([rows[start + b] for b in members])
            tree, offers = world.draft(these, _TimedLimits(planner, clock, costs, len(members)))
            path, num_accepted = world.accept(tree, these)
            for member, count in zip(members, num_accepted, strict=True):
                committed[member] += count
        drafted_s = clock.now_s
        verify_s = costs.verify_s(tree.num_rows if tree is not None else 1, batch)
        clock.now_s += verify_s + costs.overhead_s
        planner.record(
            CycleResult(drafted_s - begin_s, verify_s, costs.overhead_s, committed, tree, path, num_accepted, offers)
        )
        ledger.tokens += sum(committed)
        ledger.seconds += clock.now_s - begin_s
        ledger.drafted += bool(members)
        ledger.cycles += 1
    return ledger

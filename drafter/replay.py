"""Exact replay: what a drafter version would have accepted on recorded conversations.

The text never depends on the drafter (design 4.1), so replay is exact at every temperature. Windows walk in lockstep
through the very code that drafts live: one batched drafting step per cycle, the target's choices read from the record.
Walking only the starts that a run visits (s <- s + a(s) + 1) needs about 1/acceptance of the work of evaluating every
start in one pass, gives the same cycles, and cannot drift away from the live path because it is the live path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

import torch

from specblock.cuda_ext.noise import NoiseWindow
from specblock.cuda_ext.ops import follow_path
from specblock.cuda_ext.sampling import SamplingBatch
from specblock.drafter.interface import CacheT, Drafter, NewPositions
from specblock.drafter.plan import DraftPlan, Limits, PlannedLimits
from specblock.drafter.window import Window

_PREFILL_POSITIONS = 256


@dataclass(frozen=True, slots=True)
class Replay:
    """Cycles of one window: ``accepted`` draft tokens per cycle (a cycle cut by the end is left out)."""

    conversation_id: str
    accepted: tuple[int, ...]

    @property
    def cycles(self) -> int:
        """Complete cycles."""
        return len(self.accepted)

    @property
    def committed_tokens(self) -> int:
        """Tokens those cycles committed, bonus included."""
        return sum(self.accepted) + len(self.accepted)


def acceptance_length(walked: Sequence[Replay] | Sequence[Window]) -> float:
    """Committed tokens per complete cycle, replayed or (of windows) live: pooled, bonus included; 0 without cycles."""
    cycles = sum(len(one.accepted) for one in walked)
    return (sum(sum(one.accepted) for one in walked) + cycles) / cycles if cycles else 0.0


@torch.inference_mode()
def replay(
    drafter: Drafter[CacheT],
    windows: Sequence[Window],
    batch_windows: int = 16,
    limits: Limits | None = None,
    recorded: bool = False,
) -> list[Replay]:
    """Replays every window; the order of the results is the order of the windows.

    Args:
        drafter: the version to replay.
        windows: recorded conversations.
        batch_windows: windows replayed side by side.
        limits: sizes of every cycle's tree; None takes the drafter's settings.
        recorded: repeat the sizes of the live cycles instead, which is what makes the serving version's replay equal
            its live run when sizes were chosen per cycle.
    """
    order = sorted(range(len(windows)), key=lambda i: windows[i].tokens.shape[0])
    results: dict[int, Replay] = {}
    for start in range(0, len(order), batch_windows):
        chunk = order[start : start + batch_windows]
        run = _Lockstep(drafter, [windows[i] for i in chunk], limits, recorded)
        for index, accepted in zip(chunk, run.accepted(), strict=True):
            results[index] = Replay(windows[index].conversation_id, tuple(accepted))
    return [results[i] for i in range(len(windows))]


class _Lockstep(Generic[CacheT]):
    """Windows that are replayed side by side, one drafting step per cycle."""

    def __init__(
        self, drafter: Drafter[CacheT], windows: Sequence[Window], limits: Limits | None, recorded: bool
    ) -> None:
        device, dtype = drafter.device, drafter.dtype
        self._drafter, self._windows, self._limits, self._recorded = drafter, windows, limits, recorded
        self._cache = drafter.new_cache(len(windows), max(w.tokens.shape[0] for w in windows))
        for slot, window in enumerate(windows):
            self._cache.reset(slot, window.domain)
        self._sampling = SamplingBatch.of([w.sampling for w in windows], device)
        shared = drafter.shares_noise and any(w.sampling.temperature > 0 for w in windows)
        depth = drafter.max_depth + 1
        self._noise = NoiseWindow(len(windows), depth, drafter.vocab_size, device) if shared else None
        self._tokens = [w.tokens.to(device, torch.int64) for w in windows]
        self._features = [w.features.to(device, dtype) for w in windows]
        self._root = [w.prompt_tokens - 1 for w in windows]  # index of the root token of the next cycle
        self._cycle = [0] * len(windows)

    def accepted(self) -> list[list[int]]:
        """Accepted drafts of every complete cycle of every window."""
        accepted: list[list[int]] = [[] for _ in self._windows]
        active = [b for b, w in enumerate(self._windows) if w.num_generated > 0]
        self._catch_up(active)
        while active:
            counts: dict[int, int] = {}
            for plan, rows in self._by_plan(active).items():
                counts |= self._draft(plan, rows)
            still = []
            for b in active:
                self._root[b] += counts[b] + 1
                self._cycle[b] += 1
                if self._root[b] < self._tokens[b].shape[0]:
                    accepted[b].append(counts[b])
                if self._root[b] < self._tokens[b].shape[0] - 1:
                    still.append(b)
            active = still
        return accepted

    def _catch_up(self, active: list[int]) -> None:
        """Absorbs everything before the last position, in chunks."""

        def behind() -> list[int]:
            return [b for b in active if self._root[b] - 1 - self._cache.positions[b] > 0]

        while rows := behind():
            ends = [min(self._root[b] - 1, self._cache.positions[b] + _PREFILL_POSITIONS) for b in rows]
            self._drafter.refresh(self._cache, rows, self._new_positions(rows, ends))

    def _by_plan(self, active: list[int]) -> dict[DraftPlan | None, list[int]]:
        groups: dict[DraftPlan | None, list[int]] = {}
        for b in active:
            plans = self._windows[b].plans if self._recorded else ()
            plan = DraftPlan.from_list(plans[self._cycle[b]]) if self._cycle[b] < len(plans) else None
            groups.setdefault(plan, []).append(b)
        return groups

    def _draft(self, plan: DraftPlan | None, rows: list[int]) -> dict[int, int]:
        """Accepted drafts of one cycle of some windows; a cycle without speculation leaves its positions pending."""
        if plan is not None and plan.node_budget == 0:
            return dict.fromkeys(rows, 0)
        device, depth = self._drafter.device, self._drafter.max_depth
        # As the engine does: only after a pause is there more to absorb than drafting itself does.
        self._catch_up([b for b in rows if self._root[b] - self._cache.positions[b] > depth + 1])
        if self._noise is not None:
            sampled = [b for b in rows if self._windows[b].sampling.temperature > 0]
            self._noise.advance(
                sampled,
                [self._root[b] + 1 for b in sampled],
                [self._windows[b].sampling.seed for b in sampled],
                [self._windows[b].sampling.choice for b in sampled],
            )
        draft = self._drafter.draft(
            self._cache,
            rows,
            self._new_positions(rows, [self._root[b] for b in rows]),
            torch.stack([self._tokens[b][self._root[b]] for b in rows]),
            self._sampling.rows(torch.tensor(rows, device=device)),
            self._noise,
            self._limits if plan is None else PlannedLimits(plan),
        )
        path = torch.full((len(rows), depth), -1, dtype=torch.int64, device=device)
        for i, b in enumerate(rows):
            ahead = self._tokens[b][self._root[b] + 1 : self._root[b] + 1 + depth]
            path[i, : ahead.shape[0]] = ahead
        return dict(zip(rows, follow_path(draft.tree, path).tolist(), strict=True))

    def _new_positions(self, rows: list[int], ends: list[int]) -> NewPositions:
        counts = [end - self._cache.positions[b] for b, end in zip(rows, ends, strict=True)]
        width = max(1, *counts)
        device = self._drafter.device
        padded = torch.zeros(len(rows), width, self._features[0].shape[1], dtype=self._drafter.dtype, device=device)
        following = torch.zeros(len(rows), width, dtype=torch.int64, device=device)
        for i, (b, count) in enumerate(zip(rows, counts, strict=True)):
            at = self._cache.positions[b]
            padded[i, :count] = self._features[b][at : at + count]
            following[i, :count] = self._tokens[b][at + 1 : at + count + 1]
        return NewPositions(padded, following, counts)

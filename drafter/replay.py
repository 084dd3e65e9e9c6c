"""Exact replay: what a drafter version would have accepted on recorded conversations.

The text never depends on the drafter (design 4.1), so replay is exact at every temperature. Windows walk in lockstep
through the very code that drafts live: one batched drafting step per cycle, the target's choices read from the record.
Walking only the starts that a run visits (s <- s + a(s) + 1) needs about 1/acceptance of the work of evaluating every
start in one pass, gives the same cycles, and cannot drift away from the live path because it is the live path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specblock.cuda_ext.noise import NoiseWindow
from specblock.cuda_ext.ops import follow_path
from specblock.cuda_ext.sampling import SamplingBatch
from specblock.drafter.draft import BlockDrafter, NewPositions
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


def acceptance_length(replays: Sequence[Replay]) -> float:
    """Committed tokens per cycle, pooled over cycles, bonus included; 0 without cycles."""
    cycles = sum(r.cycles for r in replays)
    return sum(r.committed_tokens for r in replays) / cycles if cycles else 0.0


@torch.inference_mode()
def replay(drafter: BlockDrafter, windows: Sequence[Window], batch_windows: int = 16) -> list[Replay]:
    """Replays every window; the order of the results is the order of the windows."""
    order = sorted(range(len(windows)), key=lambda i: windows[i].tokens.shape[0])
    results: dict[int, Replay] = {}
    for start in range(0, len(order), batch_windows):
        chunk = order[start : start + batch_windows]
        for index, accepted in zip(chunk, _lockstep(drafter, [windows[i] for i in chunk]), strict=True):
            results[index] = Replay(windows[index].conversation_id, tuple(accepted))
    return [results[i] for i in range(len(windows))]


def _lockstep(drafter: BlockDrafter, windows: Sequence[Window]) -> list[list[int]]:
    device = drafter.model.lm_head.weight.device
    dtype = drafter.model.lm_head.weight.dtype
    longest = max(w.tokens.shape[0] for w in windows)
    cache = drafter.new_cache(len(windows), longest)
    sampling = SamplingBatch.of([w.sampling for w in windows], device)
    shared = drafter.settings.shared_noise and any(w.sampling.temperature > 0 for w in windows)
    vocab = drafter.model.config.vocab_size
    noise = NoiseWindow(len(windows), drafter.max_depth + 1, vocab, device) if shared else None
    tokens = [w.tokens.to(device, torch.int64) for w in windows]
    features = [w.features.to(device, dtype) for w in windows]
    accepted: list[list[int]] = [[] for _ in windows]
    root = [w.prompt_tokens - 1 for w in windows]  # index of the root token of the next cycle
    active = [b for b, w in enumerate(windows) if w.num_generated > 0]

    def new_positions(rows: list[int], ends: list[int]) -> NewPositions:
        counts = [end - cache.positions[b] for b, end in zip(rows, ends, strict=True)]
        width = max(1, *counts)
        padded = torch.zeros(len(rows), width, features[0].shape[1], dtype=dtype, device=device)
        following = torch.zeros(len(rows), width, dtype=torch.int64, device=device)
        for i, (b, count) in enumerate(zip(rows, counts, strict=True)):
            at = cache.positions[b]
            padded[i, :count] = features[b][at : at + count]
            following[i, :count] = tokens[b][at + 1 : at + count + 1]
        return NewPositions(padded, following, counts)

    while any(root[b] - 1 - cache.positions[b] > 0 for b in active):
        behind = [b for b in active if root[b] - 1 - cache.positions[b] > 0]
        drafter.refresh(
            cache,
            behind,
            new_positions(behind, [min(root[b] - 1, cache.positions[b] + _PREFILL_POSITIONS) for b in behind]),
        )
    while active:
        if noise is not None:
            sampled = [b for b in active if windows[b].sampling.temperature > 0]
            noise.advance(
                sampled,
                [root[b] + 1 for b in sampled],
                [windows[b].sampling.seed for b in sampled],
                [windows[b].sampling.choice for b in sampled],
            )
        roots = torch.stack([tokens[b][root[b]] for b in active])
        draft = drafter.draft(
            cache,
            active,
            new_positions(active, [root[b] for b in active]),
            roots,
            sampling.rows(torch.tensor(active, device=device)),
            noise,
        )
        path = torch.full((len(active), drafter.max_depth), -1, dtype=torch.int64, device=device)
        for i, b in enumerate(active):
            ahead = tokens[b][root[b] + 1 : root[b] + 1 + drafter.max_depth]
            path[i, : ahead.shape[0]] = ahead
        still = []
        for b, count in zip(active, follow_path(draft.tree, path).tolist(), strict=True):
            root[b] += count + 1
            if root[b] < tokens[b].shape[0]:
                accepted[b].append(count)
            if root[b] < tokens[b].shape[0] - 1:
                still.append(b)
        active = still
    return accepted

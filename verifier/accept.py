"""Lossless acceptance: the target chooses, the tree is followed while it agrees.

The token at absolute position i is arg-max(processed log-probability + Gumbel(seed, choice, i, token)), a function of
the target, the sampling parameters and the seed alone. A draft is accepted exactly when it *is* that token, so the text
never depends on the tree. Source: design section 4.1.

Legend: B requests, R tree rows, V vocabulary, N requests still walking, A accepted drafts on the longest path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specblock.cuda_ext.noise import NoiseWindow
from specblock.cuda_ext.ops import find_child
from specblock.cuda_ext.sampling import SamplingBatch, processed_log_probs
from specblock.cuda_ext.tree import DraftTree
from specblock.verifier.history import ChoiceState, PathHistory


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The target's own choices along each tree.

    Attributes:
        paths: the chosen tokens per request, accepted drafts first, the bonus token last (host).
        tokens: int64 [B, A + 1], the same, padded with -1.
        num_accepted: int64 [B], accepted drafts, bonus excluded.
        rows: int64 [B, A + 1], tree rows of the path, root (row 0) first; column j is padded with j.
    """

    paths: tuple[tuple[int, ...], ...]
    tokens: Tensor
    num_accepted: Tensor
    rows: Tensor


class TokenChooser:
    """Chooses the next token of some of B requests, given their logits and position."""

    def __init__(
        self, states: Sequence[ChoiceState], sampling: SamplingBatch, noise: NoiseWindow, slots: Sequence[int]
    ) -> None:
        self._states, self._sampling, self._noise, self._slots = states, sampling, noise, slots
        self._history = PathHistory(states)

    def prepare(self, first_position: Sequence[int]) -> None:
        """Makes the noise of every sampling request available from its ``first_position`` on."""
        picked = [b for b, state in enumerate(self._states) if state.params.temperature > 0]
        if picked:
            self._noise.advance(
                [self._slots[b] for b in picked],
                [first_position[b] for b in picked],
                [self._states[b].params.seed for b in picked],
                [self._states[b].params.choice for b in picked],
            )

    def choose(self, members: Sequence[int], logits_NV: Tensor, positions: Sequence[int]) -> Tensor:
        """int64 [N]: the target's choice for requests ``members`` from raw logits [N, V] at absolute ``positions``."""
        logits_NV = self._history.adjust(members, logits_NV)
        drawn = [n for n, member in enumerate(members) if self._states[member].params.temperature > 0]
        if not drawn:
            return logits_NV.argmax(dim=-1)
        everyone = len(drawn) == len(self._states)
        index = torch.tensor(
            [(n, members[n], self._slots[members[n]], positions[n]) for n in drawn], device=logits_NV.device
        )
        row, member, slot, position = index.unbind(1)
        sampling = self._sampling if everyone else self._sampling.rows(member)
        log_probs = processed_log_probs(logits_NV if everyone else logits_NV[row], sampling)
        choice = (log_probs + self._noise.rows(slot, position)).argmax(dim=-1)
        if len(drawn) == len(members):
            return choice
        return logits_NV.argmax(dim=-1).index_copy_(0, row, choice)

    def visit(self, members: Sequence[int], tokens: Sequence[int]) -> None:
        """Tells penalties that each of ``members`` went on with one token."""
        self._history.append(members, tokens)


def accept(
    logits_BRV: Tensor,
    tree: DraftTree,
    states: Sequence[ChoiceState],
    sampling: SamplingBatch,
    noise: NoiseWindow,
    slots: Sequence[int],
    first_position: Sequence[int],
) -> Acceptance:
    """Walks all trees level by level; only visited rows are processed.

    Args:
        logits_BRV: raw target logits of every tree row, [B, R, V].
        tree: the trees.
        states: parameters and history of the B requests; not changed.
        sampling: the same parameters as tensors.
        noise: window whose width covers the deepest path plus the bonus token.
        slots: noise slot of each request.
        first_position: absolute position of the token that follows each root.

    Returns:
        The chosen path of every request (B >= 1).
    """
    chooser = TokenChooser(states, sampling, noise, slots)
    chooser.prepare(first_position)
    device = logits_BRV.device
    num_requests = logits_BRV.shape[0]
    tokens: list[list[int]] = [[] for _ in range(num_requests)]
    rows: list[list[int]] = [[0] for _ in range(num_requests)]
    members = list(range(num_requests))
    while members:
        level = len(tokens[members[0]])
        member_N = torch.tensor(members, device=device)
        row_N = torch.tensor([rows[b][-1] for b in members], device=device)
        chosen_N = chooser.choose(members, logits_BRV[member_N, row_N], [first_position[b] + level for b in members])
        row_B = torch.zeros(num_requests, dtype=torch.int64, device=device).index_copy_(0, member_N, row_N)
        # -1 matches no child: requests that have stopped stay stopped.
        chosen_B = torch.full_like(row_B, -1).index_copy_(0, member_N, chosen_N)
        chosen, child = torch.stack([chosen_B, find_child(tree, row_B, chosen_B)]).tolist()
        chooser.visit(members, [chosen[b] for b in members])
        for b in members:
            tokens[b].append(chosen[b])
        members = [b for b in members if child[b] >= 0]
        for b in members:
            rows[b].append(child[b])
    return _pack(tokens, rows, device)


def _pack(tokens: list[list[int]], rows: list[list[int]], device: torch.device) -> Acceptance:
    width = max(len(path) for path in tokens)
    padded_tokens = [path + [-1] * (width - len(path)) for path in tokens]
    padded_rows = [path + list(range(len(path), width)) for path in rows]
    packed = torch.tensor([padded_tokens, padded_rows], device=device)
    counts = torch.tensor([len(path) - 1 for path in tokens], device=device)
    return Acceptance(tuple(map(tuple, tokens)), packed[0], counts, packed[1])
